"""``examples/rlhf_tiny.py`` in a short form: what it shows is so."""

from __future__ import annotations

import random

import pytest
import torch as th

from examples.rlhf_tiny import NICE, SENTENCE, STOP, WORDS, Progress, Texts, fine_tuned, pretrained, sentence

pytestmark = pytest.mark.learning


def text_of(words: str) -> Texts:
    return Texts.of(th.tensor([[WORDS.index(word) for word in words.split()]]))


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


def test_the_penalty_keeps_sentences_sentences_and_without_it_the_reward_is_hacked() -> None:
    th.manual_seed(0)
    reference = pretrained(width=32, n_steps=150, batch_size=64)
    before = [parameter.clone() for parameter in reference.parameters()]

    def trained(target_kl: float | None) -> tuple[Progress, Progress]:
        history = fine_tuned(reference, target_kl=target_kl, n_updates=30, n_texts=128, batch_size=64)
        return history[0], history[-1]

    (first, held), (_, hacked) = trained(4.0), trained(None)
    assert all(map(th.equal, before, reference.parameters()))
    assert first.kl == pytest.approx(0.0, abs=1e-5)
    assert first.grammatical > 0.8
    assert held.score > first.score + 1.0
    assert held.kl < 8.0
    assert held.grammatical > 0.8
    assert hacked.score > 2.0 * held.score
    assert hacked.kl > 2.0 * held.kl
    assert hacked.grammatical < 0.2
    assert hacked.different < held.different - 0.2
