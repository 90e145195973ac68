"""Learning from old rollouts, and clipping around another policy than the one that acted."""

from __future__ import annotations

from typing import Any, cast

from stable_baselines3.common.type_aliases import GymEnv

from sb3_ppo_ext.common.construction import check_no_memory, check_own_buffer
from sb3_ppo_ext.common.errors import ArgumentError
from sb3_ppo_ext.common.regularized import RegularizedAlgorithm
from sb3_ppo_ext.common.rollout.buffers import RolloutBuffer
from sb3_ppo_ext.common.update.moving_average import MovingAverage
from sb3_ppo_ext.common.update.old_rollouts import OldRollout, Reuse, Rollouts, kept
from sb3_ppo_ext.common.update.reference import FrozenPolicy


class ReusingAlgorithm(RegularizedAlgorithm):
    """
    An algorithm that may also learn from older rollouts than the newest, and clip around another policy than the one
    that acted.

    :param args: arguments of :class:`RegularizedAlgorithm`
    :param n_reused_rollouts: number of old rollouts to learn from
    :param reuse: how to learn from them, a dict of settings that differ from the defaults of :class:`Reuse`
    :param kwargs: arguments of :class:`RegularizedAlgorithm`
    """

    batch_size: int
    n_epochs: int

    # Newest first. Checkpoints contain the old rollouts and the moving average, model files do not.
    _old_rollouts: tuple[OldRollout, ...] = ()
    _average: MovingAverage | None = None

    def __init__(
        self, *args: Any, n_reused_rollouts: int = 0, reuse: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.n_reused_rollouts = n_reused_rollouts
        self.reuse = reuse

    @property
    def _reuse(self) -> Reuse:
        return Reuse.checked(self.n_reused_rollouts, self.reuse)

    def _validate(self) -> None:
        super()._validate()
        self._reuse.check_together(self)

    def _check_can_learn(self) -> None:
        super()._check_can_learn()
        reuse = self._reuse
        if self.n_reused_rollouts:
            check_own_buffer(self, f"n_reused_rollouts={self.n_reused_rollouts} is not allowed with")
            if reuse.target == "vtrace":
                check_no_memory(self, f"reuse={self.reuse!r} is not allowed with")

    def _setup_new_model(self) -> None:
        super()._setup_new_model()
        self._set_average()

    def _set_average(self) -> None:
        """Create a moving average that fits the policy, if the user wants one and there is none."""
        if self._reuse.proximal != "ewma":
            self._average = None
        elif self._average is None or not self._average.fits(self.policy):
            self._average = self._new_average()

    def _new_average(self) -> MovingAverage:
        try:
            return MovingAverage(FrozenPolicy(self.policy))
        except Exception as error:  # from a user's own class
            raise ArgumentError(
                f"reuse={self.reuse!r} is not allowed with policy={type(self.policy).__name__}: it cannot be copied "
                f"({type(error).__name__}: {error}); it must be a policy that policy.save() and policy.load() can copy"
            ) from error

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        is_new = args[2] if len(args) > 2 else kwargs.get("reset_num_timesteps", True)
        if is_new:
            self._old_rollouts = ()
        result = super()._setup_learn(*args, **kwargs)
        self._set_average()
        if self._average is not None:
            self._average.to(self.device)
            self._average.prepare(for_program=self.torch_compile)
            if is_new:
                self._average.begin_anew()
            if self._together is not None:
                self._together.group.take_from_first([*self._average.parameters(), *self._average.buffers()])
        return result

    def set_parameters(self, *args: Any, **kwargs: Any) -> None:
        """Load weights and the optimiser's state, as SB3 does. A moving average of policies restarts from them."""
        super().set_parameters(*args, **kwargs)
        self._average = None

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Replace the training environment, as SB3 does. With ``force_reset``, the old rollouts, which come from the
        previous environment, are dropped.

        :param env: an environment, its id, or a vector of environments
        :param force_reset: whether ``learn`` resets it first; otherwise training goes on as if it were the previous one
        :raises ValueError: if ``env`` is none of these
        """
        before = self.env
        super().set_env(env, force_reset)
        if force_reset and self.env is not before:
            self._old_rollouts = ()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_old_rollouts", "_average"]

    def _proximal_coefficients(self) -> dict[str, float]:
        """The coefficients of clipping around another policy, by name; empty if updates do not do so."""
        reuse = self._reuse
        numbers = {"max_importance_weight": reuse.max_importance_weight} if reuse.is_decoupled else {}
        if reuse.proximal == "ewma":
            n_samples = self.n_steps * self.n_envs * (self.n_reused_rollouts + 1)
            numbers["ewma_decay"] = reuse.decay(self.n_epochs * -(-n_samples // self.batch_size))
        return numbers

    def _rollouts(self) -> Rollouts:
        """The newest rollout and the old ones, to learn from; the newest is kept for later updates."""
        self.policy.set_training_mode(False)  # as when the rollout was evaluated
        buffer = cast(RolloutBuffer, self.rollout_buffer)
        old = self._old_rollouts[: self.n_reused_rollouts]
        self._old_rollouts = (kept(buffer, self._last_obs, self._reuse), *old)[: self.n_reused_rollouts]
        return Rollouts(
            buffer,
            old,
            self._reuse,
            self._actor_critic(),
            batch_size=self.batch_size,
            capacity=self.n_reused_rollouts + 1 if self.torch_compile else None,
        )
