"""Calls of a user, each wrong as its comment says. Checked by test_typing.py, never run."""

from torch import Tensor

import mobilemamba
from mobilemamba import MRFFI, MobileMamba, create_model, ops, training, weights

mobilemamba.s6(num_clases=10)  # error: call-arg
mobilemamba.s6(num_classes="10")  # error: arg-type
mobilemamba.s6(widths=(48, "96"))  # error: arg-type
mobilemamba.s6(pretrained=1.0)  # error: arg-type
mobilemamba.s7()  # error: attr-defined
create_model("s6", local_kernels=(7, 5, 3))  # error: arg-type
MobileMamba(10)  # error: call-arg
MRFFI(64, 0.8, 0.2, 3, 3)  # error: arg-type
training.TrainConfig(learning_rate=1e-3)  # error: call-arg
training.train(training.TrainConfig(), "runs/mine")  # error: arg-type
mobilemamba.export(mobilemamba.nano(), "model.pt", "torchscript")  # error: call-arg


def features(model: MobileMamba, images: Tensor) -> None:
    model.forward_features(images, stages=True).mean()  # error: attr-defined
    model.forward_features(images).append(images)  # error: attr-defined
    model.forward_features(images, "stages")  # error: call-overload
    model.forward_head(images).mean()  # error: union-attr
    model.reset_classifier("ten")  # error: arg-type
    model.feature_info[0]["channels"]  # error: typeddict-item
    ops.haar_conv2d(images)  # error: call-arg
    weights.entry("s6").preprocessing.transforms()(3)  # error: arg-type
    weights.load("mine.pt").preprocessing.transforms()  # error: union-attr
