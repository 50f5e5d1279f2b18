"""The networks of TRADES and RobustBench as their users build them, restated from their layer lists for the tests."""

import torch
import torch.nn.functional as F
from torch import nn


def conv(inputs, outputs, stride=1, size=3):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class WideBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs)
        self.convShortcut = conv(inputs, outputs, stride, 1) if inputs != outputs else None

    def forward(self, x):
        y = F.relu(self.bn1(x))
        branch = self.conv2(F.relu(self.bn2(self.conv1(y))))
        return branch + (x if self.convShortcut is None else self.convShortcut(y))


class Blocks(nn.Module):
    def __init__(self, count, inputs, outputs, stride):
        super().__init__()
        widths = [inputs, *[outputs] * count]
        self.layer = nn.Sequential(*(WideBlock(widths[i], outputs, stride if i == 0 else 1) for i in range(count)))

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    """Depth 6 `blocks` + 4. TRADES always makes the group `sub_block1` and never uses it; RobustBench on request."""

    def __init__(self, blocks, width, classes, sub_block1):
        super().__init__()
        a, b, c = 16 * width, 32 * width, 64 * width
        self.conv1 = conv(3, 16)
        self.block1 = Blocks(blocks, 16, a, 1)
        if sub_block1:
            self.sub_block1 = Blocks(blocks, 16, a, 1)
        self.block2, self.block3 = Blocks(blocks, a, b, 2), Blocks(blocks, b, c, 2)
        self.bn1, self.fc = nn.BatchNorm2d(c), nn.Linear(c, classes)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.avg_pool2d(F.relu(self.bn1(x)), 8).flatten(1))


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Sequential(*([conv(inputs, outputs, stride, 1), nn.BatchNorm2d(outputs)] if changes else []))

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class PreActBlock(nn.Module):
    """RobustBench's with `out_shortcut=True`."""

    act, out_shortcut = staticmethod(F.relu), True

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, stride, 1))

    def forward(self, x):
        y = self.act(self.bn1(x))
        side = self.shortcut(y if self.out_shortcut else x) if hasattr(self, "shortcut") else x
        return self.conv2(self.act(self.bn2(self.conv1(y)))) + side


class RawPreActBlock(PreActBlock):
    """RobustBench's as Wong2020Fast and Andriushchenko2020Understanding use it."""

    out_shortcut = False


class SoftplusPreActBlock(PreActBlock):
    """E-AT's."""

    act = staticmethod(F.softplus)


class ResNet(nn.Module):
    def __init__(self, block, classes, bn_before_fc=False):
        super().__init__()
        self.conv1 = conv(3, 64)
        if block is BasicBlock:
            self.bn1 = nn.BatchNorm2d(64)
        for i, (inputs, outputs) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)], 1):
            setattr(self, f"layer{i}", nn.Sequential(block(inputs, outputs, min(i, 2)), block(outputs, outputs, 1)))
        if bn_before_fc:
            self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, classes)

    def forward(self, x):
        x = self.conv1(x)
        x = F.relu(self.bn1(x)) if hasattr(self, "bn1") else x
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = F.relu(self.bn(x)) if hasattr(self, "bn") else x
        return self.linear(F.avg_pool2d(x, 4).flatten(1))


class SmallCNN(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = {"conv1": (1, 32), "conv2": (32, 32), "conv3": (32, 64), "conv4": (64, 64)}
        self.feature_extractor = nn.ModuleDict({name: nn.Conv2d(*size, 3) for name, size in sizes.items()})
        sizes = {"fc1": (1024, 200), "fc2": (200, 200), "fc3": (200, 10)}
        self.classifier = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})

    def forward(self, x):
        f, c = self.feature_extractor, self.classifier
        x = F.max_pool2d(F.relu(f.conv2(F.relu(f.conv1(x)))), 2)
        x = F.max_pool2d(F.relu(f.conv4(F.relu(f.conv3(x)))), 2)
        return c.fc3(F.relu(c.fc2(F.relu(c.fc1(x.flatten(1))))))


class Normalised(nn.Module):
    """How RobustBench's models normalise: a subclass with buffers `mu` and `sigma` beside the layers."""

    def __init__(self, network):
        super().__init__()
        for name, child in network.named_children():
            self.add_module(name, child)
        self.register_buffer("mu", torch.zeros(1, 3, 1, 1))
        self.register_buffer("sigma", torch.ones(1, 3, 1, 1))
        self.body = type(network).forward

    def forward(self, x):
        return self.body(self, (x - self.mu) / self.sigma)
