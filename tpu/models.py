"""The networks of the paper, from `keras.applications`, with random weights and logits; ResNet-50 v1.5; a small one."""

import keras
from keras import layers

# name: (builder, side of the images)
MODELS = {
    "resnet50": (keras.applications.ResNet50, 224),
    "resnet101": (keras.applications.ResNet101, 224),
    "inception_v3": (keras.applications.InceptionV3, 299),
    "inception_resnet_v2": (keras.applications.InceptionResNetV2, 299),
}
SMALL, V1_5 = "resnet_small", "resnet50_v1_5"
NAMES = (*MODELS, V1_5, SMALL)


def image_size(name):
    """Side of the images that a network was published with; 64 for the small one."""
    return MODELS[name][1] if name in MODELS else 64 if name == SMALL else 224


def build(name, size, classes=1000, weight_decay=0.0, momentum=None, zero_gamma=False):
    """The network `name`, from bytes (batch, size, size, 3) to float32 logits (batch, classes).

    Batch statistics are those of each replica's slice, as in the paper. `weight_decay` adds half of it times the
    squared norm of all kernels to the loss, but for biases and normalization. The auxiliary head of Inception-v3 is
    not part of `keras.applications` and not here.

    Raises:
        ValueError: There is no such network.
    """
    if name not in NAMES:
        raise ValueError(f"`--model` must be one of {', '.join(NAMES)}. Received: {name!r}")
    inputs = keras.Input((size, size, 3), dtype="uint8")
    scaled = layers.Rescaling(1 / 127.5, offset=-1.0)(inputs)
    if name == SMALL:
        features = resnet(scaled, width=8, blocks=(1, 1, 1, 1), zero_gamma=zero_gamma)
    elif name == V1_5:
        features = resnet(scaled, zero_gamma=zero_gamma)
    else:
        builder, _ = MODELS[name]
        features = builder(include_top=False, weights=None, input_tensor=scaled, pooling="avg").output
    # float32 also where the rest is bfloat16: a softmax over a thousand logits needs the digits
    outputs = layers.Dense(classes, name="logits", dtype="float32")(features)
    model = keras.Model(inputs, outputs, name=name)
    for layer in model.layers:
        if momentum is not None and isinstance(layer, layers.BatchNormalization):
            layer.momentum = momentum
    if weight_decay:
        for kernel in kernels(model):
            kernel.regularizer = keras.regularizers.L2(weight_decay / 2)
    return model


def kernels(model):
    """The weights that decay."""
    return [w for w in model.trainable_variables if "kernel" in w.name]


def resnet(x, width=64, blocks=(3, 4, 6, 3), zero_gamma=False):
    """ResNet-50 "v1.5", whose blocks stride in the 3x3 convolution, or a smaller one; pooled (batch, 32 width)."""
    x = convolved(x, width, 7, strides=2)
    x = layers.MaxPooling2D(3, strides=2, padding="same")(x)
    for stage, count in enumerate(blocks):
        for block in range(count):
            x = bottleneck(x, width * 2**stage, 2 if stage and not block else 1, zero_gamma)
    return layers.GlobalAveragePooling2D()(x)


def bottleneck(x, width, strides, zero_gamma):
    """1x1, 3x3, 1x1 beside a shortcut; four times the width leaves."""
    inner = convolved(x, width, 1)
    inner = convolved(inner, width, 3, strides=strides)
    inner = convolved(inner, 4 * width, 1, activation=None, gamma="zeros" if zero_gamma else "ones")
    if x.shape[-1] != 4 * width or strides > 1:
        x = convolved(x, 4 * width, 1, strides=strides, activation=None)
    return layers.Activation("relu")(layers.Add()([x, inner]))


def convolved(x, filters, size, strides=1, activation="relu", gamma="ones"):
    """Convolution, normalization, activation."""
    x = layers.Conv2D(filters, size, strides=strides, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization(momentum=0.9, epsilon=1.001e-5, gamma_initializer=gamma)(x)
    return layers.Activation(activation)(x) if activation else x
