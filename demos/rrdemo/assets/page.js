// What the page does by itself, without asking the server: seek the player, follow it on the timeline, save text.
// Listeners sit on the document, so that they outlive whatever Gradio renders anew.
(() => {
  const player = () => document.querySelector("#player video");
  const clock = (seconds) => {
    const [hours, minutes, rest] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, Math.floor(seconds) % 60];
    const two = (number) => String(number).padStart(2, "0");
    return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
  };
  const number = (element, name) => Number(element.getAttribute(name));
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  const seek = (seconds) => {
    const video = player();
    if (!video) return;
    if (video.readyState > 0) video.currentTime = seconds;
    else video.addEventListener("loadedmetadata", () => { video.currentTime = seconds; }, { once: true });
    show(seconds);
  };

  // The timeline is a slider (role="slider") over the whole video; its value is where the player stands.
  const show = (seconds) => {
    const track = document.querySelector("#timeline [role=slider]");
    if (!track) return;
    const duration = number(track, "aria-valuemax");
    track.style.setProperty("--position", duration ? clamp(seconds / duration, 0, 1) : 0);
    track.setAttribute("aria-valuenow", seconds.toFixed(1));
    track.setAttribute("aria-valuetext", `${clock(seconds)} of ${clock(duration)}`);
  };
  const timeUnder = (track, event) => {
    const box = track.getBoundingClientRect();
    return clamp((event.clientX - box.left) / box.width, 0, 1) * number(track, "aria-valuemax");
  };
  const keySteps = (track, key) => {
    const [now, end, step] = [number(track, "aria-valuenow"), number(track, "aria-valuemax"), number(track, "data-step")];
    return {
      ArrowLeft: now - step, ArrowDown: now - step, ArrowRight: now + step, ArrowUp: now + step,
      PageDown: now - end / 10, PageUp: now + end / 10, Home: 0, End: end,
    }[key];
  };

  let dragged = null;
  document.addEventListener("pointerdown", (event) => {
    const track = event.target.closest?.("#timeline [role=slider]");
    if (!track || event.button !== 0) return;
    dragged = track;
    track.setPointerCapture(event.pointerId);
    seek(timeUnder(track, event));
  });
  document.addEventListener("pointermove", (event) => {
    const track = event.target.closest?.("#timeline [role=slider]");
    if (!track) return;
    track.style.setProperty("--pointer", timeUnder(track, event) / number(track, "aria-valuemax"));
    track.setAttribute("data-pointer", clock(timeUnder(track, event)));
    if (dragged === track) seek(timeUnder(track, event));
  });
  for (const name of ["pointerup", "pointercancel"]) document.addEventListener(name, () => { dragged = null; });

  document.addEventListener("keydown", (event) => {
    const track = event.target.closest?.("#timeline [role=slider]");
    if (!track || event.ctrlKey || event.metaKey || event.altKey) return;
    const target = keySteps(track, event.key);
    const video = player();
    if (target !== undefined) seek(clamp(target, 0, number(track, "aria-valuemax")));
    else if (event.key === " " && video) video.paused ? video.play() : video.pause();
    else return;
    event.preventDefault();
  });

  // Times in answers are links to #t=SECONDS, moments under the timeline are buttons with data-time.
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.('a[href*="#t="], button[data-time]');
    if (!link) return;
    event.preventDefault();
    seek(Number(link.dataset.time ?? link.getAttribute("href").split("#t=")[1]));
    if (innerWidth < 900) player()?.scrollIntoView({ block: "center", behavior: "smooth" });
  }, true);

  // Media events do not bubble, but they can be captured.
  document.addEventListener("timeupdate", (event) => {
    if (event.target === player() && !dragged) show(event.target.currentTime);
  }, true);
  document.addEventListener("error", (event) => {
    if (event.target === player()) document.querySelector("#player")?.classList.add("unplayable");
  }, true);
  document.addEventListener("loadeddata", (event) => {
    if (event.target === player()) document.querySelector("#player")?.classList.remove("unplayable");
  }, true);

  // The arrow before an answer's figures is a button to which Gradio gives no name.
  new MutationObserver(() => {
    for (const arrow of document.querySelectorAll('#chat .thought-group button[aria-label=""]')) {
      arrow.setAttribute("aria-label", "Figures");
    }
  }).observe(document.documentElement, { childList: true, subtree: true });

  window.rrdemo = {
    // Where the player stands, as a clip's start or end is written.
    now: () => (Math.round((player()?.currentTime ?? 0) * 10) / 10).toString(),
    save: (text, name) => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "text/plain;charset=utf-8" }));
      link.download = name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    },
  };
})();
