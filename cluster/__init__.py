"""What knows there is a cluster: the engine, checkpoints, reports and the manifests."""

import logging

# DeepSpeed prints these on standard output, the first while it is being imported (so the filter is set here,
# before that); we choose the device ourselves and test the optimizers we offer.
_NOT_NEWS = ("Setting accelerator to CPU", "using ZeRO with an untested optimizer")
logging.getLogger("DeepSpeed").addFilter(lambda record: not any(text in str(record.msg) for text in _NOT_NEWS))
