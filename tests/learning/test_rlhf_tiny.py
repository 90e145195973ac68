"""``examples/rlhf_tiny.py`` in a short form: what it shows is so."""

from __future__ import annotations

import random

import pytest
import torch as th

from examples.rlhf_tiny import NICE, SENTENCE, STOP, WORDS, Progress, Texts, fine_tuned, pretrained, sentence

pytestmark = pytest.mark.learning


def text_of(words: str) -> Texts:
    return Texts.of(th.tensor([[WORDS.index(word) for word in words.split()]]))


def mean(history: list[Progress]) -> Progress:
    return Progress(*(sum(numbers) / len(history) for numbers in zip(*history, strict=True)))


def test_the_grammar_knows_its_own_sentences_and_no_others() -> None:
    rng = random.Random(0)
    assert all(SENTENCE.fullmatch(" ".join(sentence(rng))) for _ in range(200))
    wrong = ["the cat loves", "cat sees the dog .", "the kind kind cat sees the dog .", "kind kind .", "."]
    assert not any(SENTENCE.fullmatch(text) for text in wrong)


def test_a_text_ends_with_its_first_stop() -> None:
    texts = text_of("the kind cat loves the dog . kind kind")
    assert texts.strings() == ["the kind cat loves the dog ."]
    assert texts.scores().tolist() == [2.0]
    assert text_of("kind kind kind").scores().tolist() == [3.0]  # without one, all counts
    assert STOP not in NICE


def test_the_penalty_keeps_sentences_and_without_it_the_reward_is_hacked() -> None:
    th.manual_seed(0)
    reference = pretrained(width=32, n_steps=150)
    before = [parameter.clone() for parameter in reference.parameters()]

    def trained(**options: float) -> list[Progress]:
        return fine_tuned(reference, n_texts=64, learning_rate=4e-3, **options)[1]  # type: ignore[arg-type]

    held = trained(kl_coef=1.0, target_kl=2.0, n_updates=12)
    hacked = trained(kl_coef=0.0, n_updates=10)
    assert all(map(th.equal, before, reference.parameters()))
    first, last = held[0], mean(held[-5:])
    assert first.kl == pytest.approx(0.0, abs=1e-5)
    assert first.grammatical > 0.75
    assert last.score > first.score + 1.0
    assert 1.0 < last.kl < 4.0
    assert last.grammatical > 0.4
    assert hacked[-1].score > 2.0 * last.score
    assert hacked[-1].kl > 5.0 * last.kl
    assert hacked[-1].kl_coef == 0.0
    assert hacked[-1].grammatical < 0.1
    assert hacked[-1].different < last.different - 0.1
