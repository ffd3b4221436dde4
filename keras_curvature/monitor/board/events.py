"""Write event files for TensorBoard: numbers, texts, histograms, pictures and a layout, one file per run.

The records are built here, because `tf.summary.scalar` writes one number at a time at ten times the cost, and
`tf.summary.histogram` needs a sample.
"""

import os

import tensorflow as tf

Summary, Metadata = tf.compat.v1.Summary, tf.compat.v1.SummaryMetadata

# `data_class` of TensorBoard's `SummaryMetadata`
SCALAR, TENSOR, BLOBS = 1, 2, 3
# Milliseconds until readers see what was written.
FLUSH = 5000


class Events:
    """The event file of one run, opened at the first write.

    Args:
        folder: The run's folder, which TensorBoard shows by its path under `--logdir`.
        describe: A function from a tag to its description in Markdown. Defaults to no description.
    """

    def __init__(self, folder, describe=lambda tag: ""):
        self.folder, self._describe, self._writer = folder, describe, None

    def scalars(self, values, step):
        """Write `{tag: number}`."""
        summary = Summary()
        for tag, value in values.items():
            self._add(summary, tag, tf.make_tensor_proto(float(value), tf.float32), "scalars", SCALAR)
        self._write(summary, step)

    def text(self, tag, markdown, step):
        """Write a text in Markdown."""
        self._one(tag, tf.make_tensor_proto([markdown.encode()], tf.string), "text", TENSOR, step)

    def histogram(self, tag, triples, step, title, description):
        """Write a histogram given as `(bins, 3)`: left, right and height of each bin."""
        self._one(tag, tf.make_tensor_proto(triples, tf.float64), "histograms", TENSOR, step, title, description)

    def image(self, tag, png, step):
        """Write a picture, the bytes of a PNG file."""
        height, width, _ = tf.io.decode_png(png).shape
        parts = [str(width).encode(), str(height).encode(), png]
        self._one(tag, tf.make_tensor_proto(parts, tf.string), "images", BLOBS, step)

    def layout(self, layout, step):
        """Write the charts of the Custom Scalars page, TensorBoard's `Layout` message."""
        from tensorboard.plugins.custom_scalar import summary as custom_scalar

        self._write(custom_scalar.pb(layout), step)

    def flush(self):
        """Make what was written visible to readers."""
        if self._writer is not None:
            self._writer.flush()

    def close(self):
        """Close the file; a later write opens another file of the same run."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _one(self, tag, tensor, plugin, data_class, step, *words):
        summary = Summary()
        self._add(summary, tag, tensor, plugin, data_class, *words)
        self._write(summary, step)

    def _add(self, summary, tag, tensor, plugin, data_class, title="", description=None):
        metadata = Metadata(
            plugin_data=Metadata.PluginData(plugin_name=plugin), data_class=data_class, display_name=title,
            summary_description=self._describe(tag) if description is None else description,
        )  # fmt: skip
        summary.value.add(tag=tag, tensor=tensor, metadata=metadata)

    def _write(self, summary, step):
        if not summary.value:
            return
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(self.folder, flush_millis=FLUSH)
        # even where a training script switched its own summaries off
        with self._writer.as_default(), tf.summary.record_if(True):
            tf.summary.experimental.write_raw_pb(summary.SerializeToString(), step=step)


def make_folder(owner, name, folder):
    """Create a folder and try to write into it.

    Raises:
        ValueError: Writing is not permitted, or the path is not a folder.
    """
    test = os.path.join(folder, f".written_by_{os.getpid()}")
    try:
        tf.io.gfile.makedirs(folder)
        with tf.io.gfile.GFile(test, "w") as file:
            file.write("")
        tf.io.gfile.remove(test)
    except tf.errors.OpError as error:
        raise ValueError(
            f"`{type(owner).__name__}`: `{name}` must be a folder that can be written. Received: {name}={folder!r}, "
            f"and writing there fails: {error.message}. Choose another folder, or change its permissions."
        ) from error
