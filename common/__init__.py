"""What scripts share. Importing any of it leaves out what torch and diffusers print where torchao is installed."""

import logging

TORCHAO = {
    "torch.utils._pytree": "Calling register_constant() on Enum subclasses",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}
for logger, line in TORCHAO.items():
    logging.getLogger(logger).addFilter(lambda record, line=line: line not in record.getMessage())
