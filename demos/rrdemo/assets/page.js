// What the page does by itself, without asking the server: seek the player, follow it on the timeline, save text.
// Listeners sit on the document, so that they outlive whatever Gradio renders anew.
(() => {
  const SLIDER = "#timeline [role=slider]";
  const player = () => document.querySelector("#player video");
  const clock = (seconds) => {
    const [hours, minutes, rest] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, Math.floor(seconds) % 60];
    const two = (number) => String(number).padStart(2, "0");
    return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
  };
  const number = (element, name) => Number(element.getAttribute(name));
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const range = (track) => [number(track, "aria-valuemin"), number(track, "aria-valuemax")];

  const seek = (seconds) => {
    const video = player();
    if (!video) return;
    if (video.readyState > 0) video.currentTime = seconds;
    else video.addEventListener("loadedmetadata", () => { video.currentTime = seconds; }, { once: true });
    show(seconds);
  };

  // The timeline is a slider (role="slider") over the video, or over the clip; its value is where the player stands.
  const show = (seconds) => {
    const track = document.querySelector(SLIDER);
    if (!track) return;
    const [low, high] = range(track);
    const shown = clamp(seconds, low, high);
    track.style.setProperty("--position", high > low ? (shown - low) / (high - low) : 0);
    track.setAttribute("aria-valuenow", shown.toFixed(1));
    track.setAttribute("aria-valuetext", `${clock(seconds)} of ${clock(number(track, "data-duration"))}`);
  };
  const timeUnder = (track, event) => {
    const box = track.getBoundingClientRect();
    const [low, high] = range(track);
    return low + clamp((event.clientX - box.left) / box.width, 0, 1) * (high - low);
  };
  const keySteps = (track, key) => {
    const [low, high] = range(track);
    const [now, step] = [player()?.currentTime ?? 0, number(track, "data-step")];
    return {
      ArrowLeft: now - step, ArrowDown: now - step, ArrowRight: now + step, ArrowUp: now + step,
      PageDown: now - (high - low) / 10, PageUp: now + (high - low) / 10, Home: low, End: high,
    }[key];
  };

  // Gradio resets the timeline to the server's markup, which has no data-shown, with each plan and answer.
  // What had the keyboard in it would then have lost it.
  let zoomed = false;
  let held = false; // the timeline is what was last focused
  for (const name of ["focusin", "pointerdown"]) {
    document.addEventListener(name, (event) => { held = Boolean(event.target.closest?.(SLIDER)); });
  }
  const zoom = () => {
    const track = document.querySelector(SLIDER);
    const button = document.querySelector("#timeline .zoom");
    if (!track) return;
    if (held && document.activeElement === document.body) track.focus({ preventScroll: true });
    track.setAttribute("data-shown", "");
    const near = zoomed && button;
    const [low, high] = near
      ? [number(button, "data-start"), number(button, "data-end")] : [0, number(track, "data-duration")];
    track.setAttribute("aria-valuemin", low);
    track.setAttribute("aria-valuemax", high);
    track.querySelector("svg").setAttribute("viewBox", `${low} 0 ${high - low} 40`);
    const labels = document.querySelectorAll("#timeline .scale span");
    [low, high].forEach((seconds, index) => { labels[index].textContent = clock(seconds); });
    button?.setAttribute("aria-pressed", String(Boolean(near)));
    show(player()?.currentTime ?? 0);
  };
  new MutationObserver(() => {
    if (document.querySelector(`${SLIDER}:not([data-shown])`)) zoom();
  }).observe(document.documentElement, { childList: true, subtree: true, attributeFilter: ["data-shown"] });

  let dragged = null;
  document.addEventListener("pointerdown", (event) => {
    const track = event.target.closest?.(SLIDER);
    if (!track || event.button !== 0) return;
    dragged = track;
    track.setPointerCapture(event.pointerId);
    seek(timeUnder(track, event));
  });
  document.addEventListener("pointermove", (event) => {
    const track = event.target.closest?.(SLIDER);
    if (!track) return;
    const box = track.getBoundingClientRect();
    track.style.setProperty("--pointer", clamp((event.clientX - box.left) / box.width, 0, 1));
    track.setAttribute("data-pointer", clock(timeUnder(track, event)));
    if (dragged === track) seek(timeUnder(track, event));
  });
  for (const name of ["pointerup", "pointercancel"]) document.addEventListener(name, () => { dragged = null; });

  document.addEventListener("keydown", (event) => {
    const track = event.target.closest?.(SLIDER);
    if (!track || event.ctrlKey || event.metaKey || event.altKey) return;
    const target = keySteps(track, event.key);
    const video = player();
    if (target !== undefined) seek(clamp(target, ...range(track)));
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
  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("#timeline .zoom, button[data-copy]");
    if (button?.matches(".zoom")) {
      zoomed = !zoomed;
      zoom();
    } else if (button) {
      navigator.clipboard?.writeText(button.dataset.copy).then(() => {
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = "Copy"; }, 1500);
      });
    }
  });

  // Messages hold joiners that nobody sees (answers.py); what is copied does not.
  const write = navigator.clipboard?.writeText.bind(navigator.clipboard);
  if (write) navigator.clipboard.writeText = (text) => write(text.replaceAll("\u2060", ""));

  // What is larger than the server takes is told at once, in our words, and never sent.
  const tooLarge = (files) => {
    const told = document.querySelector("#too-large");
    told.hidden = ![...(files ?? [])].some((file) => file.size > number(told, "data-limit"));
    return !told.hidden;
  };
  for (const [name, chosen] of [["change", (event) => event.target.files], ["drop", (event) => event.dataTransfer?.files]]) {
    document.addEventListener(name, (event) => {
      if (!event.target.closest?.("#upload") || !tooLarge(chosen(event))) return;
      event.preventDefault();
      event.stopPropagation();
      if (name === "change") event.target.value = "";
    }, true);
  }

  // Media events do not bubble, but they can be captured.
  document.addEventListener("timeupdate", (event) => {
    if (event.target === player() && !dragged) show(event.target.currentTime);
  }, true);
  document.addEventListener("error", (event) => {
    if (event.target === player()) document.querySelector("#player")?.classList.add("unplayable");
  }, true);
  document.addEventListener("loadstart", (event) => {
    if (event.target !== player()) return;
    zoomed = false;
    zoom();
    event.target.scrollIntoView({ block: "nearest" });
  }, true);
  document.addEventListener("loadeddata", (event) => {
    if (event.target === player()) document.querySelector("#player")?.classList.remove("unplayable");
  }, true);

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
