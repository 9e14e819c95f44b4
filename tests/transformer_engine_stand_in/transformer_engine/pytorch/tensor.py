"""Named by an import of megatron-core, not used without fp8."""


class QuantizedTensor:
    """No parameter is one."""
