"""Named by an import of megatron-core, not used without fp8."""


class FP8GlobalStateManager:
    """Not used."""


fp8_autocast = None
