"""The public face of the blocks: importing this file registers them all. Add a family's file here; a user's own blocks come by --plugin."""
from models.csp import C3, C3SPP, C3TR, Bottleneck, BottleneckCSP, C3x, CrossConv, CSPStage, TransformerBlock, TransformerLayer
from models.ghost import C3Ghost, GBneck, GhostBottleneck, GhostConv, GhostModule, GhostStem
from models.layers import ADD, SE, SPP, SPPF, Concat, Contract, Conv, DWConv, DWConvTranspose2d, Expand, Focus, MixConv2d
from models.shuffle import DWConvblock, Shuffle_Block, conv_bn_relu_maxpool

__all__ = [
    "ADD", "C3", "C3SPP", "C3TR", "SE", "SPP", "SPPF", "Bottleneck", "BottleneckCSP", "C3Ghost", "C3x", "CSPStage", "Concat", "Contract", "Conv",
    "CrossConv", "DWConv", "DWConvTranspose2d", "DWConvblock", "Expand", "Focus", "GBneck", "GhostBottleneck", "GhostConv", "GhostModule",
    "GhostStem", "MixConv2d", "Shuffle_Block", "TransformerBlock", "TransformerLayer", "conv_bn_relu_maxpool",
]  # fmt: skip
