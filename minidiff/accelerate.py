"""The one room that knows torch.compile."""

from .networks.unet import UNet


def compile_unet(unet: UNet) -> UNet:
    """The same UNet, its forward compiled on first use: one graph for each kind of record and edit, batch and size.

    fullgraph, since a graph break would hide a cost; dynamic shapes off, since attention and convolutions are chosen by
    shape.
    """
    unet.compile(fullgraph=True, dynamic=False)
    return unet
