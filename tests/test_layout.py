"""The tokenizer and the files around the weights of the embedded model."""

import pytest
from checkpoints import CORPUS

from rrvideo.tiny.layout import SPECIAL_TOKENS, make_tokenizer, save_layout


@pytest.mark.parametrize("text", ["What colour is the circle?", "Où est l'étoile ?\n\t", "星はどこ 🎬", "1:02:03"])
def test_any_text_survives_a_tokenizer_trained_on_a_few_words(tmp_path, text):
    from transformers import AutoTokenizer

    trained = make_tokenizer(CORPUS, 300)
    save_layout(tmp_path, trained, min_pixels=3136, max_pixels=9408)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    assert len(tokenizer) == 300
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text) == trained.encode(text)


def test_special_tokens_come_first_and_are_never_split():
    tokenizer = make_tokenizer(CORPUS, 300)

    assert tokenizer.encode("".join(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="at least 264, got 263"):
        make_tokenizer(CORPUS, 263)
