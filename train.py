"""Train a network named in YAML on a data set named in YAML.

    python train.py --cfg yolov5s-ghost.yaml --data shapes.yaml --imgsz 256 --epochs 20
    python train.py --weights yolov5n.pt --data my_data.yaml
    python train.py --resume
    python train.py --cfg yolov5s-shuffle.yaml --teacher runs/train/yolov5m/weights/best.pt --data my_data.yaml
    python train.py --weights runs/train/exp/weights/best.pt --qat --data my_data.yaml
    torchrun --nproc_per_node 2 train.py --cfg yolov5s.yaml --data coco128.yaml
"""
from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from utils.config import TrainConfig
from utils.errors import UserError, script
from utils.flags import parse_given
from utils.threads import wait_politely


@script
def main(argv: Sequence[str] | None = None) -> int:
    given = parse_given(TrainConfig, argv, "Train a detector named in YAML.")
    wait_politely()
    # PyTorch and what needs it come in only now, so that --help answers at once.
    import torch

    from models.plugin import load_plugin
    from models.prune import channel_graph
    from models.summary import print_summary
    from models.yolo import build_for_training, check_network, load_model, model_from_checkpoint
    from utils.checkpoint import load_checkpoint
    from utils.cpu import keep_freed_memory
    from utils.data.open import open_splits
    from utils.device import compute_dtype, select_device
    from utils.distributed import join_world
    from utils.files import discarded_if_refused
    from utils.log import info, warn
    from utils.training.anchors import adapt_anchors
    from utils.training.distill import build_distillation
    from utils.training.fit import Training
    from utils.training.memory import fit_batch
    from utils.training.optim import freeze_rows
    from utils.training.qat import QuantizationAware, to_fine_tune
    from utils.training.runs import PREPARED, new_run, resumed_run, run_folder
    from utils.training.sparsity import Sparsity, build_sparsity

    run = resumed_run(given) if "resume" in given else new_run(given)
    config, hyp = run.config, run.hyp
    keep_freed_memory()
    device = select_device(config.device)
    load_plugin(config.plugin)
    if not run.checkpoint:
        check_network(config.cfg, config.weights)

    with join_world(device) as world:
        train_split, val_split = world.first_alone(lambda: open_splits(config, ("train", "val")))
        torch.manual_seed(config.seed)
        if run.checkpoint:
            model = model_from_checkpoint(run.checkpoint, config.resume)
            if model.names != train_split.names:
                raise UserError(f"{config.data}: has other classes now than when {config.resume} began: put them back, or start anew with --weights")
        else:
            model, transfer = build_for_training(config.cfg, config.weights, train_split.names)
            info(f"{config.weights}: {transfer}" if transfer else "weights: random")
            if config.qat:
                model = to_fine_tune(model, load_checkpoint(config.weights).names, config.weights)
            elif model.spec.fused:
                warn(f"{config.weights}: has no batch norms any more (folded by --qat, or before it was saved): give --qat, "
                     "or start from the checkpoint before")
            config = dataclasses.replace(config, imgsz=model.whole_strides(config.imgsz))
            info(adapt_anchors(model, train_split, config.imgsz, hyp.anchor_t, config.noautoanchor, config.seed))
        for layer in model.unread_rows:
            warn(f"{layer.place}: nothing of it reaches Detect, so that it is not trained")
            if world.size > 1:  # processes would wait for each other's gradients of it
                model.model[layer.row].requires_grad_(False)
        freeze_rows(model, config.freeze)
        model.to(device, memory_format=torch.channels_last)
        distillation = build_distillation(model, [load_model(path) for path in config.teacher], config, device) if config.teacher else None
        largest = model.whole_strides(config.imgsz * 3 // 2) if config.multi_scale else config.imgsz
        dtype = compute_dtype(config.precision, device)
        if len(set(world.gather(str(dtype)))) > 1:
            raise UserError("--precision auto: the GPUs are of unlike kinds: name a precision that all have, such as --precision fp32")
        learner = QuantizationAware.with_any_range(model) if config.qat else model
        fit = fit_batch(learner, config.batch_size, largest, device, world, len(train_split.images), dtype)
        config = dataclasses.replace(config, batch_size=fit.batch_size)
        print_summary(model, config.imgsz, device, dtype)
        sparsity = build_sparsity(config, channel_graph(model), model) if config.slim or config.soft_prune else Sparsity()
        with run_folder(run, config) if world.rank == 0 else nullcontext() as own:
            folder = world.share(own)
            run = dataclasses.replace(run, config=config, folder=folder, checkpoint=None)  # its tensors are the model's and the state's now
            with discarded_if_refused(folder, PREPARED):
                training = Training(model, run, train_split, val_split, device, world, distillation, sparsity, fit.host_bytes)
            if world.rank == 0 and not config.noplots and not run.state:
                training.draw_data()
            training.run()
            if world.rank == 0:
                training.report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
