"""The public face of the blocks: importing this file registers them all. Add a family's file here; a user's own blocks come by --plugin."""
from models.backbones import Level
from models.csp import C3, C3SPP, C3TR, Bottleneck, BottleneckCSP, C3x, CrossConv, CSPStage, TransformerBlock, TransformerLayer
from models.ghost import C3Ghost, GBneck, GhostBottleneck, GhostConv, GhostModule, GhostStem
from models.ghostv2 import GBneckV2, GhostModuleV2
from models.layers import ADD, SE, SPP, SPPF, Concat, Contract, Conv, DWConv, DWConvTranspose2d, Expand, Focus, MixConv2d
from models.lcnet import DepthSepConv
from models.mobile import FusedMBConv, InvertedResidual, MBConv, MobileStem
from models.rep import RepGhostBneck, RepGhostModule, RepVGGBlock
from models.shuffle import DWConvblock, Shuffle_Block, ShuffleUnit, conv_bn_relu_maxpool
from models.timm_backbone import Timm
from models.torchvision_backbone import Torchvision

__all__ = [
    "ADD", "C3", "C3SPP", "C3TR", "SE", "SPP", "SPPF", "Bottleneck", "BottleneckCSP", "C3Ghost", "C3x", "CSPStage", "Concat", "Contract", "Conv",
    "CrossConv", "DWConv", "DWConvTranspose2d", "DWConvblock", "DepthSepConv", "Expand", "Focus", "FusedMBConv", "GBneck", "GBneckV2",
    "GhostBottleneck", "GhostConv", "GhostModule", "GhostModuleV2", "GhostStem", "InvertedResidual", "Level", "MBConv", "MixConv2d", "MobileStem",
    "RepGhostBneck", "RepGhostModule", "RepVGGBlock", "ShuffleUnit", "Shuffle_Block", "Timm", "Torchvision", "TransformerBlock", "TransformerLayer",
    "conv_bn_relu_maxpool",
]  # fmt: skip
