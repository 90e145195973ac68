"""``NonFiniteError``, under the module name that scripts of the first edition import."""

from sb3_ppo_ext.common.errors import NonFiniteError

__all__ = ["NonFiniteError"]
