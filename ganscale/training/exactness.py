"""What cannot be made exact on several ranks is refused at the start, with what to use instead."""

from torch import nn

from ganscale.errors import UserError


def refuse_what_breaks_exactness(generator: nn.Module, critic: nn.Module) -> None:
    """Raises UserError for layers with which a run depends on its cluster."""
    for name, module in critic.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"the critic's layer `{name}` is a batch norm, which ties the samples of a batch "
                "together and differs between ranks: use layer, group or instance norm, or none"
            )
    for network, layers in (("critic", critic), ("generator", generator)):
        for name, module in layers.named_modules():
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                raise UserError(
                    f"the {network}'s layer `{name}` is a dropout, whose draws differ between "
                    "ranks and after a restart: set its p to 0"
                )
