"""A modifier for llm-compressor: feed-forwards become narrower, what goes moves to its likes."""

from __future__ import annotations

from tempfile import TemporaryDirectory

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr
from tiny_llama import save_tiny_llama
from torch import nn

from dotresize import l1_cost, sinkhorn


class NarrowFeedForward(Modifier):
    width: int
    merging: bool = True
    requires_calibration_data: bool = True
    _seen: dict = PrivateAttr(default_factory=dict)  # of each down_proj, its inputs

    def on_initialize(self, state, **kwargs) -> bool:
        for module in [m.down_proj for m in state.model.modules() if hasattr(m, "down_proj")]:
            self._seen[module] = []
            self.register_hook(module, lambda m, x: self._seen[m].append(x[0][0]), "forward_pre")
        return True

    def on_sequential_epoch_end(self, state, event, modules, **kwargs) -> None:
        for mlp in [m for m in modules if getattr(m, "down_proj", None) in self._seen]:
            x, down = torch.cat(self._seen.pop(mlp.down_proj)), mlp.down_proj.weight.data
            order = (x.norm(dim=0) * down.norm(dim=0)).argsort(descending=True)
            kept, gone = order[: self.width], order[self.width :]
            cost = l1_cost(x[:, gone], x[:, kept])
            plan = sinkhorn(cost, 0.05 * float(cost.mean()), tol=1e-4).plan * len(gone)
            new = {layer: layer.weight.data[kept] for layer in (mlp.gate_proj, mlp.up_proj)}
            new[mlp.down_proj] = down[:, kept] + self.merging * (down[:, gone] @ plan)
            for layer, weight in new.items():
                layer.weight = nn.Parameter(weight)
                layer.out_features, layer.in_features = weight.shape

    def on_finalize(self, state, **kwargs) -> bool:
        self.remove_hooks()
        state.model.config.intermediate_size = self.width
        return True


if __name__ == "__main__":
    errors = []
    with TemporaryDirectory() as folder, torch.no_grad():
        model, *texts = save_tiny_llama(folder), *torch.randint(128, (9, 1, 32))
        dense = model(texts[0]).logits
        data = torch.utils.data.DataLoader([{"input_ids": t} for t in texts[1:]], batch_size=None)
        for merging in (False, True):
            recipe = NarrowFeedForward(width=64, merging=merging)
            model = oneshot(model=folder, dataset=data, recipe=recipe, pipeline="sequential")
            errors.append(float((model(texts[0]).logits - dense).norm() / dense.norm()))
    print("error of the logits: {:.0%} dropped, {:.0%} merged".format(*errors))
    assert errors[1] < errors[0]
