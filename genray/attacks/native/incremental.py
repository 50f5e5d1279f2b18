"""A forward pass that computes again only what a changed window of the images reaches (methods D4, Square).

Square changes one small window, the same for the whole batch, and asks for the logits. Convolutions and poolings see
little of it: a window of 4 x 4 pixels reaches 8 x 8 outputs of the second 3 x 3 convolution. So every layer's output
for the current images is kept, and a changed batch costs a dense slice of each layer. Nothing is approximated: the
slices are what the full layer gives, up to rounding, and they replace what is kept (no sums that drift).
"""

import math

import torch
from torch import fx

from genray.attacks.native.layers import Step, Window, steps_of, union

# Above this share of a layer's outputs the whole layer is as fast: it needs no copy of its inputs.
LARGEST_SHARE = 0.8
# Of the largest logit: well above the rounding of bfloat16, well below another function.
TRACE_TOLERANCE = 0.03


class PlainForward:
    """The ordinary forward pass, in the form of `IncrementalForward`.

    Args:
        model: images (N, C, H, W) -> logits (N, K); no image's logits depend on another image.

    Attributes:
        images: (N, C, H, W), the current ones.
    """

    def __init__(self, model):
        self.model, self.images, self._proposed = model, None, None

    def start(self, images):
        """Takes over the images; returns their logits."""
        self.images = images.clone()
        return self.model(self.images)

    def propose(self, content, window: Window | None = None):
        """Logits of the current images with `content` in the window (in place of the whole images without one)."""
        self._proposed = content if window is None else self.images.clone()
        if window is not None:
            self._proposed[_slices(window)] = content
        return self.model(self._proposed)

    def proposed(self, rows):
        """The last proposal of these images (int64 positions)."""
        return self._proposed[rows]

    def accept(self, rows):
        """Makes the last proposal current for these images."""
        self.images[rows] = self._proposed[rows]

    def keep(self, rows):
        """Goes on with these images only, in this order."""
        self.images, self._proposed = self.images[rows], None


class IncrementalForward:
    """As `PlainForward`, but computes only what changes; made by `of`.

    Convolutions, max-poolings and elementwise layers are computed on slices; any other layer, and all that follows
    it, on whole images.
    """

    def __init__(self, steps: list[Step]):
        self._steps = steps
        self._input, self._output = steps[0].node, steps[-1].node
        self._kept, self._size, self._fresh = {}, {}, {}

    @classmethod
    def of(cls, model, images) -> "IncrementalForward | None":
        """One for a model in eval mode, which has to stay as it is; None where its computation cannot be followed.

        That is a forward which branches on values, or changes tensors in place, or has no layer to slice.

        Args:
            images: at least one, to try it on.
        """
        try:
            steps = steps_of(fx.symbolic_trace(model))
        except Exception:  # tracing runs the network's own code, which may raise anything
            return None
        return cls(steps) if steps and cls(steps)._agrees(model, images[:2]) else None

    def _agrees(self, model, images):
        """Whether it really is the model's function: a trace is silent about `+=`, hooks and the like."""
        plain, window = PlainForward(model), ((0, 3), (1, 4))
        content = 1 - images[_slices(window)]
        pairs = [(f.start(images), f.propose(content, window)) for f in (self, plain)]
        ours, true = (torch.cat(pair) for pair in pairs)
        return bool((ours - true).abs().amax() <= TRACE_TOLERANCE * true.abs().amax())

    @property
    def images(self):
        return self._inner(self._input)

    def start(self, images):
        logits = self._run(images, None)
        for step in self._steps:
            if step.kept:
                self._keep_whole(step, self._fresh[step.node][1])
        return logits

    def propose(self, content, window: Window | None = None):
        return self._run(content, window)

    def proposed(self, rows):
        window, content = self._fresh[self._input]
        if window is None:
            return content[rows]
        images = self.images[rows]
        images[_slices(window)] = content[rows]
        return images

    def accept(self, rows):
        for node in self._kept:
            window, value = self._fresh[node]
            target = self._inner(node) if window is None else self._inner(node)[_slices(window)]
            target[rows] = value[rows]

    def keep(self, rows):
        self._kept = {node: (kept[rows], border) for node, (kept, border) in self._kept.items()}
        self._fresh = {}

    def _run(self, content, window):
        """The pass; afterwards `_fresh` has (window, value) of each kept node: where it changed, and to what."""
        self._fresh = {self._input: (window, content)}
        for step in self._steps:
            if step.node is not self._input:
                self._fresh[step.node] = self._compute(step)
            if window is None:
                self._size[step.node] = getattr(self._fresh[step.node][1], "shape", ())[2:]
            for node in step.finished:
                del self._fresh[node]
        return self._fresh.pop(self._output)[1]

    def _compute(self, step):
        window = self._changed(step)
        if window is not None and step.slide is not None:
            return window, step.slide(self._read(step.sources[0], step.slide.inputs(window)))
        values = step.constants | {source: self._read(source, window) for source in step.sources}
        args, kwargs = fx.node.map_arg((step.node.args, step.node.kwargs), values.__getitem__)
        return window, step.call(*args, **kwargs)

    def _changed(self, step) -> Window | None:
        """Where a layer's output changes; None: everywhere, or so much that slicing does not pay."""
        windows = [self._fresh[source][0] for source in step.sources]
        if not step.sliced or None in windows or len({self._size[source] for source in step.sources}) > 1:
            return None
        window, size = union(windows), self._size[step.node]
        if step.slide is not None:
            window = step.slide.outputs(window, size)
        area = math.prod(stop - start for start, stop in window)
        return window if area <= LARGEST_SHARE * math.prod(size) else None

    def _read(self, node, window):
        """A node's proposed values in a window, which may reach into the border of zeros; None: the whole."""
        changed, value = self._fresh[node]
        if changed is None or changed == window:
            return value
        kept, border = self._kept[node]
        if window is None:
            window = tuple((0, side) for side in self._size[node])
        around = kept[_slices(window, (-border, -border))].clone()
        overlap = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(window, changed))
        if all(start < stop for start, stop in overlap):
            (top, _), (left, _) = window
            (new_top, _), (new_left, _) = changed
            around[_slices(overlap, (top, left))] = value[_slices(overlap, (new_top, new_left))]
        return around

    def _keep_whole(self, step, value):
        """Keeps values with a border of zeros around them, so that slices at the edge need no padding."""
        (height, width), border = value.shape[2:], step.border
        last = value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous()
        kept = torch.empty(
            (*value.shape[:2], height + 2 * border, width + 2 * border),
            dtype=value.dtype,
            device=value.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )
        self._kept[step.node] = kept.zero_(), border
        self._inner(step.node).copy_(value)

    def _inner(self, node):
        kept, border = self._kept[node]
        return kept[:, :, border : kept.shape[2] - border, border : kept.shape[3] - border]


def _slices(window, origin=(0, 0)):
    """Index of a window of (N, C, H, W) whose rows and columns are numbered from `origin`."""
    rows, columns = (slice(start - first, stop - first) for (start, stop), first in zip(window, origin))
    return slice(None), slice(None), rows, columns
