"""What others published, to stand beside what is measured here, and what makes scores of returns."""

from __future__ import annotations

# Mean returns after a million steps, as published; v3, v4 and v5 are not the same tasks.
PUBLISHED: dict[str, dict[str, str]] = {
    "sb3-contrib TRPO, v3, 3 seeds": {
        "HalfCheetah": "1803",
        "Ant": "3554",
        "Hopper": "3372",
        "Walker2d": "4502",
        "Swimmer": "359",
    },
    "tianshou 1 TRPO, v3, 10 seeds": {
        "HalfCheetah": "4471",
        "Ant": "2867",
        "Hopper": "2046",
        "Walker2d": "3827",
        "Swimmer": "41",
    },
    "tianshou 1 PPO, v3, 10 seeds": {
        "HalfCheetah": "5784",
        "Ant": "3258",
        "Hopper": "2609",
        "Walker2d": "3589",
        "Swimmer": "67",
    },
    "tianshou 2 PPO, v4, IQM": {"Ant": "971 [801, 1320]"},
    "CleanRL PPO, v4": {"HalfCheetah": "1443", "Hopper": "2383", "Walker2d": "2288"},
}

# By environment: the mean return of 100 episodes of actions drawn uniformly (first states by the seeds 0 to 99), which
# is score 0, and what is score 1: gymnasium's reward threshold. Two tasks have none. For Pendulum-v1 that is -200; for
# Walker2d-v5, the highest of the published figures.
SCORE_0_AND_1: dict[str, tuple[float, float]] = {
    "CartPole-v1": (23.68, 475.0),
    "Acrobot-v1": (-497.08, -100.0),
    "Pendulum-v1": (-1207.56, -200.0),
    "MountainCarContinuous-v0": (-33.25, 90.0),
    "LunarLander-v3": (-191.96, 200.0),
    "HalfCheetah-v5": (-282.49, 4800.0),
    "Hopper-v5": (16.67, 3800.0),
    "Walker2d-v5": (1.77, 4502.0),
    "Swimmer-v5": (0.80, 360.0),
    "Ant-v5": (-48.05, 6000.0),
    "InvertedDoublePendulum-v5": (49.09, 9100.0),
}
