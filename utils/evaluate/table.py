"""The table that a validation prints."""
from __future__ import annotations

import numpy as np

from utils.data.labels import Split
from utils.evaluate.validate import ValResult


def score_table(result: ValResult, split: Split, per_class: bool) -> str:
    """Images, objects, P, R, F1 (at the confidence of the best F1), mAP50 and mAP50-95: a line for all, and one for each class that has truth."""
    m, scores, c = result.metrics(), result.scores, result.curves
    width = max(8, *(min(len(name), 24) for name in split.names))
    lines = [f"{'class':>{width}}  {'images':>7}  {'objects':>8}  {'P':>7}  {'R':>7}  {'F1':>7}  {'mAP50':>7}  {'mAP50-95':>8}"]

    def line(name: str, images: int, objects: int, values: tuple[float, ...]) -> str:
        return f"{name[:24]:>{width}}  {images:>7}  {objects:>8}  " + "  ".join(f"{v:>{8 if n == 4 else 7}.4f}" for n, v in enumerate(values))

    objects = [t.cls if t.crowd is None else t.cls[~np.asarray(t.crowd, bool)] for t in result.truths]
    counts = np.array([np.bincount(cls, minlength=len(split.names)) for cls in objects])
    lines.append(line("all", len(result.truths), int(counts.sum()), tuple(m.values())))
    if per_class and len(split.names) > 1:
        for k in c.classes:
            values = (c.precision_at_best[k], c.recall_at_best[k], c.f1_at_best[k], scores.per_class_ap50[k], scores.per_class_ap[k])
            lines.append(line(split.names[k], int((counts[:, k] > 0).sum()), int(counts[:, k].sum()), values))
    by_size = ", ".join(f"{name} {value:.4f}" for name, value in
                        (("small", scores.ap_small), ("medium", scores.ap_medium), ("large", scores.ap_large)) if np.isfinite(value))
    ap75 = f"{scores.ap75:.4f}" if np.isfinite(scores.ap75) else "no truth"
    lines.append(f"mAP50-95 by size: {by_size or 'no truth'}; mAP75 {ap75}; P, R, F1 at confidence {c.best_conf:.3f}")
    return "\n".join(lines)
