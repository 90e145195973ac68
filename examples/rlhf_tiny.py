"""
Fine-tune a small language model by a reward on its texts: RLHF without human feedback, small enough to watch.

    python -m examples.rlhf_tiny

1. A GRU learns to write sentences of a small grammar, such as "the old cat sees the kind dog ."
2. The reward of a text is its number of nice words. PPO with the dual clip makes the model write more of them. A
   penalty on the KL divergence keeps the model close to its start; the coefficient of the penalty follows a target.
   The texts become nicer, and are still sentences.
3. The same without the penalty: the model hacks the reward. Its texts are mostly nice words, and no longer sentences.

The losses come from :mod:`sb3_ppo_ext.losses`; everything else is in this file.
"""

from __future__ import annotations

import copy
import random
import re
from typing import NamedTuple

import torch as th
from torch import nn

from sb3_ppo_ext import losses
from sb3_ppo_ext.common.update.controllers import adapted_by_kl

# The language

NICE = ["kind", "lovely", "happy", "loves", "thanks"]
ADJECTIVES = ["kind", "lovely", "happy", "old", "grey", "tired", "angry", "small"]
NOUNS = ["cat", "dog", "bird", "child", "king", "robot"]
VERBS = ["loves", "thanks", "sees", "finds", "hears", "fears"]
STOP = "."
WORDS = [*dict.fromkeys([*ADJECTIVES, *NOUNS, *VERBS, "the", "and", STOP])]
MAX_WORDS = 20  # the longest sentence has 16

THING = rf"the (({'|'.join(ADJECTIVES)}) )?({'|'.join(NOUNS)})"
CLAUSE = rf"{THING} ({'|'.join(VERBS)}) {THING}"
SENTENCE = re.compile(rf"{CLAUSE}( and {CLAUSE})? \.")


def thing(rng: random.Random) -> list[str]:
    adjective = [rng.choice(ADJECTIVES)] if rng.random() < 0.5 else []
    return ["the", *adjective, rng.choice(NOUNS)]


def sentence(rng: random.Random) -> list[str]:
    words = [*thing(rng), rng.choice(VERBS), *thing(rng)]
    if rng.random() < 0.3:
        words += ["and", *thing(rng), rng.choice(VERBS), *thing(rng)]
    return [*words, STOP]


class Texts(NamedTuple):
    words: th.Tensor  # indices into WORDS, shape (n_texts, MAX_WORDS); words after the first stop do not count
    mask: th.Tensor  # True up to the first stop, same shape

    @classmethod
    def of(cls, words: th.Tensor) -> Texts:
        is_stop = words == WORDS.index(STOP)
        return cls(words, is_stop.cumsum(1) - is_stop.int() == 0)

    def strings(self) -> list[str]:
        rows = zip(self.words.tolist(), self.mask.sum(1).tolist(), strict=True)
        return [" ".join(WORDS[index] for index in words[:length]) for words, length in rows]

    def scores(self) -> th.Tensor:
        """The reward of each text: its number of nice words."""
        nice = th.tensor([word in NICE for word in WORDS])
        return (nice[self.words] & self.mask).sum(1).float()


def grammar_book(n_texts: int) -> Texts:
    rng = random.Random(0)
    rows = [[WORDS.index(word) for word in sentence(rng)] for _ in range(n_texts)]
    return Texts.of(th.tensor([row + [0] * (MAX_WORDS - len(row)) for row in rows]))


# The models


class Reader(nn.Module):
    """A network with an output before each word of a text: the logits of that word (language model) or V (critic)."""

    def __init__(self, n_outputs: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS) + 1, width)  # the last one stands before each text
        self.memory = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, n_outputs)

    def forward(self, words: th.Tensor) -> th.Tensor:
        begin = th.full_like(words[:, :1], len(WORDS))
        hidden, _ = self.memory(self.embedding(th.cat((begin, words[:, :-1]), 1)))
        return self.head(hidden)  # type: ignore[no-any-return]

    @th.no_grad()
    def write(self, n_texts: int) -> Texts:
        words, state = [th.full((n_texts, 1), len(WORDS))], None
        for _ in range(MAX_WORDS):
            hidden, state = self.memory(self.embedding(words[-1]), state)
            words.append(self.head(hidden[:, -1]).softmax(-1).multinomial(1))
        return Texts.of(th.cat(words[1:], 1))


def log_prob_of(words: th.Tensor, logits: th.Tensor) -> th.Tensor:
    return logits.log_softmax(-1).gather(-1, words.unsqueeze(-1)).squeeze(-1)


def descend(loss: th.Tensor, optimizer: th.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def pretrained(*, width: int = 64, n_steps: int = 500) -> Reader:
    """Train a language model on sentences of the grammar."""
    model, book = Reader(len(WORDS), width), grammar_book(4096)
    optimizer = th.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(n_steps):
        rows = th.randint(len(book.words), (128,))
        words, mask = book.words[rows], book.mask[rows]
        loss = losses.masked_mean(-log_prob_of(words, model(words)), mask)
        descend(loss, optimizer)
    return model


# PPO


class Progress(NamedTuple):
    """Means over the texts of one update."""

    score: float
    kl: float  # of a whole text, from the policy to the reference, in nats
    kl_coef: float
    entropy: float  # of a word, in nats
    grammatical: float  # share of texts that are sentences
    different: float  # share of the words of a text that occur in it for the first time


def fine_tuned(
    reference: Reader,
    *,
    kl_coef: float = 0.4,
    target_kl: float = 5.0,
    n_updates: int = 60,
    n_texts: int = 256,
    learning_rate: float = 1e-3,
) -> tuple[Reader, list[Progress]]:
    """
    :param reference: the model to begin with; it does not change
    :param kl_coef: first coefficient of the penalty; 0 stays 0
    :param target_kl: KL divergence of a whole text, from the policy to the reference
    :return: the fine-tuned model, and the progress at each update
    """
    policy, critic = copy.deepcopy(reference), Reader(1, reference.head.in_features)
    optimizer = th.optim.Adam([*policy.parameters(), *critic.parameters()], lr=learning_rate)
    history = []

    for _ in range(n_updates):
        words, mask = texts = policy.write(n_texts)
        with th.no_grad():
            logits, values = policy(words), critic(words).squeeze(-1)
            old_log_prob, ref_log_prob = log_prob_of(words, logits), log_prob_of(words, reference(words))
        rewards = losses.token_rewards(texts.scores(), old_log_prob, ref_log_prob, kl_coef=kl_coef, mask=mask)
        advantages = losses.token_gae(rewards, values, gamma=1.0, gae_lambda=0.95, mask=mask)
        returns, advantages = advantages + values, losses.masked_whiten(advantages, mask)

        for rows in (rows for _ in range(4) for rows in th.randperm(n_texts).chunk(2)):
            log_prob, counts = log_prob_of(words[rows], policy(words[rows])), mask[rows]
            surrogate = losses.dual_clip_surrogate_loss(log_prob, old_log_prob[rows], advantages[rows], mask=counts)
            value_loss = losses.value_loss(critic(words[rows]).squeeze(-1), returns[rows], mask=counts)
            loss = losses.aggregate(surrogate.loss + 0.5 * value_loss, counts, mode="token-mean")
            descend(loss, optimizer)

        kl = losses.aggregate(losses.kl_k3(ref_log_prob, old_log_prob), mask, mode="seq-mean-token-sum").item()
        entropy = losses.masked_mean(losses.masked_entropy(logits), mask).item()
        history.append(Progress(texts.scores().mean().item(), kl, kl_coef, entropy, *quality(texts)))
        kl_coef = adapted_by_kl(kl_coef, kl, target_kl=target_kl, tolerance=1.1, factor=1.05, minimum=0.0, maximum=10.0)
    return policy, history


def quality(texts: Texts) -> tuple[float, float]:
    """Share of sentences, and share of different words."""
    strings = texts.strings()
    grammatical = [SENTENCE.fullmatch(text) is not None for text in strings]
    different = [len(set(text.split())) / len(text.split()) for text in strings]
    return sum(grammatical) / len(strings), sum(different) / len(strings)


def main() -> None:
    th.set_num_threads(1)
    th.manual_seed(0)
    reference = pretrained()
    for title, kl_coef in (("KL held near 5 nats", 0.4), ("no KL penalty", 0.0)):
        print(f"\n{title}\nupdate  score      KL   coef  entropy  sentences  different words")
        policy, history = fine_tuned(reference, kl_coef=kl_coef)
        for update, row in enumerate(history):
            if update % 10 == 0 or update == len(history) - 1:
                numbers = f"{update:6}  {row.score:5.2f}  {row.kl:6.2f}  {row.kl_coef:5.3f}  {row.entropy:7.2f}"
                print(f"{numbers}  {row.grammatical:9.0%}  {row.different:15.0%}")
        print("\nwhat it writes now:", *policy.write(4).strings(), sep="\n  ")


if __name__ == "__main__":
    main()
