"""Any backbone of timm (Wightman, 2019) as a row; timm is imported when a row asks for it."""
from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from models.backbones import Backbone, Map, check_weights, from_image, read_weights
from models.registry import register
from utils.errors import UserError, first_line
from utils.extras import import_extra
from utils.files import did_you_mean

_PROBES = (1, 3, 256, 192), (1, 3, 192, 256)


@register("Timm", channels=from_image, foreign=True)
class Timm(Backbone):
    """A network of timm, as its `features_only` makes it."""

    def __init__(self, name: str, out: Sequence[int] = (2, 3, 4), pretrained: bool | str = False) -> None:
        super().__init__(name, out, pretrained)
        timm = import_extra("timm")
        if not isinstance(name, str) or not timm.is_model(name):
            raise UserError(f"timm has no network {name}{did_you_mean(name, timm.list_models())}")
        self._options, whole = _any_size(timm, name)
        is_last = str(getattr(whole, "output_fmt", "")).endswith("NHWC")
        infos = enumerate(whole.feature_info.info)  # of several maps of one stride, the last
        levels = {info["reduction"].bit_length() - 2: Map(n, info["num_chs"], is_last) for n, info in infos if info["reduction"].bit_count() == 1}
        self._options["out_indices"] = tuple(m.place for m in self._choose(levels))
        self.net = self._create()
        self._normalise_by(self.net.pretrained_cfg["mean"], self.net.pretrained_cfg["std"])

    def _create(self, **options: Any) -> nn.Module:
        return import_extra("timm").create_model(self.name, features_only=True, **self._options, **options)

    def reparameterize(self) -> None:
        """Branches that one convolution can do are made one, where the network has such."""
        for module in self.net.modules():
            # A branch that is a norm alone is made a convolution of as many channels as its block had when it was made, which narrowing doesn't know.
            sizes = {child.num_features for child in module.children() if isinstance(child, nn.BatchNorm2d)}
            if hasattr(module, "reparameterize") and len(sizes) == 1:
                (channels,) = sizes
                for name in ("in_channels", "groups"):
                    if isinstance(getattr(module, name, None), int):
                        setattr(module, name, min(getattr(module, name), channels))
        import_extra("timm").utils.reparameterize_model(self.net, inplace=True)

    def _pretrained(self, **source: Any) -> Mapping[str, Tensor]:
        """What timm loads of a source; it warns of a classifier's tensors, for which this network has no use."""
        logger = logging.getLogger("timm")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            return self._create(pretrained=True, **source).state_dict()
        finally:
            logger.setLevel(level)

    def _fetch(self) -> Mapping[str, Tensor]:
        try:
            return self._pretrained()
        except Exception as error:  # of timm, of the hub's client or of the network: of any kind
            raise UserError(
                f"the weights of timm's {self.name} can't be fetched ({first_line(error)}); where there is a network run python -c \"import timm, "
                f"safetensors.torch as s; s.save_file(timm.create_model('{self.name}', pretrained=True).state_dict(), '{self.name}.safetensors')\" "
                f"and give the file as pretrained: {self.name}.safetensors") from error

    def _read(self, path: Path) -> Mapping[str, Tensor]:
        with torch.device("meta"):
            whole = import_extra("timm").create_model(self.name)
        classifier = whole.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier))
        known = whole.state_dict()
        weights = read_weights(path)
        check_weights(path, self.name, weights, {key: value for key, value in known.items() if not key.startswith(heads)}, known)
        return self._pretrained(pretrained_cfg_overlay={"state_dict": weights})


def _any_size(timm: ModuleType, name: str) -> tuple[dict[str, Any], nn.Module]:
    """The options that let a network take images of any size, and the network so made, without memory."""
    with torch.device("meta"):
        if not getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
            return {}, timm.create_model(name, features_only=True)
        # always_partition: Swin's last stage, a single window at 224 px, is several at a detector's sizes, and must shift them too
        for options in ({"dynamic_img_size": True, "always_partition": True}, {"dynamic_img_size": True}, {"strict_img_size": False}):
            try:
                return options, timm.create_model(name, features_only=True, **options)
            except TypeError:  # no such option
                pass
        net = timm.create_model(name, features_only=True).eval()
        for shape in _PROBES:
            try:
                net(torch.zeros(shape))
            except Exception as error:
                raise UserError(f"{name} takes images of one size only, so it can't be a detector's backbone ({first_line(error)})") from error
        return {}, net
