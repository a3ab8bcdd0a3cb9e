"""What a step holds on its device besides the run's state, moment by moment.

Counted over transformers' LLaMA layer with PEFT's LoRA around bitsandbytes' product: which tensors
each operation keeps for its backward pass, and which live at once where most do. Nothing is fitted;
``tests/unit/test_activations.py`` runs such steps on tensors without memory, and compares.
"""

from dataclasses import dataclass

from qlora_dist.shapes import ModelShape
from qlora_dist.sizes import (
    DROPOUT_PARTS_BYTES,
    NF4_BLOCK,
    Component,
    cuts_trained,
    dequantised_slices,
    dtype_bytes,
    layer_bytes,
    layer_targets,
    trained_bytes,
    trained_dtype_bytes,
)
from qlora_dist.spec import LoraAdapter, Nf4Quantization, RunSpec


@dataclass(frozen=True)
class Moment:
    """When much memory is held at once.

    Attributes:
        name: What happens then.
        components: What is held besides weights, gradients and optimizer.
        gathered_layers: Whole decoder layers that a sharded run has on its device then.
        gathered_ends: And how often the embedding, the head and the last norm.
    """

    name: str
    components: tuple[Component, ...]
    gathered_layers: int
    gathered_ends: int = 1


def moments(spec: RunSpec, shape: ModelShape, *, attention: str) -> tuple[Moment, ...]:
    """The moments of a step with the longest batch, one of which is the peak.

    Args:
        spec: The run.
        shape: Its model.
        attention: The attention kernel, one of sdpa, eager, varlen.
    """
    batch = _Sizes(spec, shape, spec.batch.micro_size, attention)
    found = [_start(batch), _loss(batch), _last_norm(batch), _backward(batch)]
    if batch.lora is None:
        found.append(_head(batch))
        if batch.rows_of_trained:
            found.append(_last_reduction(batch))
    if attention == "eager":
        found.append(_scores(batch))
    if spec.data.validation_rows:
        found.append(_evaluation(_Sizes(spec, shape, spec.evaluation.micro_size, attention)))
    return tuple(found)


class _Sizes:
    """A forward pass's sizes.

    Attributes:
        b: Bytes of a number of the computation.
        rows: Sequences.
        tokens: Of all of them.
        hidden: Bytes of one ``(tokens, hidden)`` tensor.
        inner: Bytes of one ``(tokens, intermediate)`` tensor.
        lora: The adapter, if there is one.
        rows_of_trained: Whether FSDP2 gathers what is trained, and reduces its gradients.
        head: Numbers of the output head.
        casts: Whether autocast makes copies of trained weights, which are kept like activations.
        fused: Whether a frozen matrix and its adapter are one product, and a norm and a gate one
            function each (qlora_dist.train.lora, pointwise).
    """

    def __init__(self, spec: RunSpec, shape: ModelShape, rows: int, attention: str) -> None:
        self.spec, self.shape, self.rows, self.attention = spec, shape, rows, attention
        self.b = dtype_bytes(spec)
        self.seq = spec.data.sequence_tokens
        self.tokens = rows * self.seq
        self.hidden = self.tokens * shape.hidden_size * self.b
        self.inner = self.tokens * shape.intermediate_size * self.b
        self.fused = spec.model.dtype == "bf16"
        self.lora = spec.adapter if isinstance(spec.adapter, LoraAdapter) else None
        self.rows_of_trained = cuts_trained(spec)
        self.head = shape.vocab_size * shape.hidden_size
        wide = self.lora is None and trained_dtype_bytes(spec) > self.b
        self.casts = wide and not self.rows_of_trained

    @property
    def dropout(self) -> bool:
        """Whether an adapter's inputs are dropped out."""
        return self.lora is not None and self.lora.dropout > 0

    @property
    def masked(self) -> bool:
        """Whether attention is given a mask: of samples in a row, or of padding."""
        return self.attention != "varlen" and (self.spec.data.packing or self.rows > 1)

    def logits(self, num_bytes: int) -> Component:
        """A line for tensors over the vocabulary that take so many bytes an element together."""
        size = self.tokens * self.shape.vocab_size
        why = f"{self.tokens:,} tokens x {self.shape.vocab_size:,} x {num_bytes} bytes"
        return Component("logits", size * num_bytes, why)

    def copies(self) -> int:
        """Bytes of a layer's matrices, as autocast copies them."""
        return layer_bytes(self.spec, self.shape) if self.casts else 0

    def reduced(self) -> int:
        """Bytes of a layer's gradients while FSDP2 reduces them: until it reduces the next."""
        if not self.rows_of_trained:
            return 0
        if self.lora is None:
            return layer_bytes(self.spec, self.shape) // self.b * 4
        return trained_bytes(self.spec, self.shape) // self.shape.num_layers

    def adapter_gradients(self, rows: int, cols: int) -> int:
        """Bytes of the gradients of an adapter's two matrices, before they are added up."""
        r = self.lora.r if self.lora else 0
        return r * (rows + cols) * trained_dtype_bytes(self.spec)

    def workspace(self) -> int:
        """Bytes that the largest product needs beside its operands, in its backward pass."""
        return max(self._workspace(*sizes) for sizes in self.shape.linears.values())

    def _workspace(self, rows: int, cols: int) -> int:
        if self.lora is None:
            # The gradient of a matrix, and again as it is added up.
            return rows * cols * (self.b + (4 if self.casts else 0))
        adapter = self.adapter_gradients(rows, cols)
        quantised = isinstance(self.spec.quantization, Nf4Quantization)
        if not self.fused:
            # And both of its matrices, and these, in the dtype of the computation.
            adapter += 2 * (self.lora.r if self.lora else 0) * (rows + cols) * self.b
            # The matrix dequantised, and its constants.
            return adapter + quantised * (rows * cols * self.b + rows * cols // NF4_BLOCK * 4)
        # The adapter's gradients are made before a slice of the matrix is dequantised.
        parts = DROPOUT_PARTS_BYTES if self.dropout else 0
        slices = dequantised_slices(rows, cols, self.b, self.tokens)
        return adapter + max(parts, quantised * rows * cols * self.b // slices)


def _start(at: _Sizes) -> Moment:
    """The first layer's gather: FSDP2 lets a gather's buffer go only when the next one is through.

    It is the peak of small models and short sequences. Each gather is there twice, as it came and
    cut into its tensors.
    """
    components = (Component("activations", at.hidden, f"the embedding of {at.tokens:,} tokens"),)
    return Moment("the first layer's gather", components, gathered_layers=2, gathered_ends=2)


def _loss(at: _Sizes) -> Moment:
    """The loss's gradient: all that the layers keep, and three tensors over the vocabulary."""
    # The last norm keeps its input. Of the vocabulary: log-probabilities and the gradients before
    # and behind them, in fp32.
    norm = at.tokens * _norm_bytes(at, at.shape.hidden_size)
    kept, why = _kept(at)
    copy = Component("passing", at.head * at.b, "the head, as autocast copies it")
    components = (
        Component("activations", kept + norm, why),
        at.logits(3 * 4),
        *((copy,) if at.casts else ()),
    )
    return Moment("the loss's gradient", components, gathered_layers=0)


def _last_norm(at: _Sizes) -> Moment:
    """The last norm's backward pass: its input, the gradient that it is given, and two more."""
    kept, why = _kept(at)
    # The loss's is that of the head's input, and of it cast.
    count, size, how = (4, at.b, "") if at.fused else (6, 4, ", in fp32")
    passing = count * size * at.tokens * at.shape.hidden_size
    components = (
        Component("activations", kept, why),
        Component("passing", passing, f"a norm's{how}"),
    )
    return Moment("the last norm's backward pass", components, gathered_layers=0)


def _backward(at: _Sizes) -> Moment:
    """The last layer's backward pass, with all that the layers before it keep."""
    kept, why = _kept(at)
    if at.spec.model.gradient_checkpointing:
        # The first norm is given the layer's input.
        kept += layer_activation_bytes(at) - at.fused * at.hidden
        kept += at.copies()
        why += f" and one whole layer of {at.tokens:,} tokens"
    what = "gradients on their way" if at.lora is None else "a dequantised matrix, or gradients"
    passing = _passing(at)
    if at.rows_of_trained:
        # The head's is reduced last. A layer's is while the next one, which keeps less, goes back.
        passing += at.head * at.b * (at.lora is None)
        passing += max(0, at.reduced() - _kept(at)[0] // at.shape.num_layers)
    components = (
        Component("activations", kept, why),
        Component("passing", passing, what),
    )
    return Moment("the last layer's backward pass", components, gathered_layers=2)


def _head(at: _Sizes) -> Moment:
    """The head's gradient: made, and then added up in the dtype of the weights."""
    kept, why = _kept(at)
    logits = at.tokens * at.shape.vocab_size * at.b
    making = logits + at.head * at.b * at.casts
    passing = at.head * at.b + max(making, at.head * 4 * at.casts)
    norm = at.tokens * _norm_bytes(at, at.shape.hidden_size)
    components = (
        Component("activations", kept + norm, why),
        Component("passing", passing, "the gradient of the head's weights"),
    )
    return Moment("the head's gradient", components, gathered_layers=0)


def _last_reduction(at: _Sizes) -> Moment:
    """FSDP2 reduces the gradients of embedding and head, in fp32, when all others are through."""
    ends = at.shape.num_embedding_params + at.shape.hidden_size
    world = at.spec.resources.nodes * max(
        at.spec.resources.gpus_per_node, at.spec.resources.processes_per_node or 1
    )
    # With them as they came, or one of them and this process's rows of the sum.
    size = 4 * ends + max(ends * at.b, 4 * ends // world + at.head * at.b)
    why = "of embedding and head, fp32"
    return Moment(
        "the last reduction", (Component("passing", size, why),), gathered_layers=0, gathered_ends=0
    )


def _passing(at: _Sizes) -> int:
    """Bytes that pass through the layer's MLP on the way back, the most at once."""
    workspace, dropout = at.workspace(), at.dropout
    if at.fused:
        # The layer's gradient, and that of the last product's input, made slice by slice; then,
        # that input let go, the gate's two gradients.
        return at.hidden + at.inner + max(workspace, at.inner)
    if not at.spec.model.gradient_checkpointing:
        return workspace + 4 * at.hidden
    # The two residuals, the gradient of all of it and of the MLP's last product; with it that
    # product's matrix, or its input with dropout, there and back. Further down: gradients.
    return 4 * at.hidden + max(workspace, 2 * at.inner if dropout else 0, 3 * at.hidden)


def _scores(at: _Sizes) -> Moment:
    """Eager attention's backward pass: the softmax's two gradients, both in fp32."""
    kept, why = _kept(at)
    if at.spec.model.gradient_checkpointing:
        kept += layer_activation_bytes(at)
        why += f" and one whole layer of {at.tokens:,} tokens"
    # The MLP's part of the layer is let go by then, and what the product with the values kept.
    kept -= (3 if at.fused else 4) * at.inner + 2 * at.hidden
    scores = at.rows * at.shape.num_heads * at.seq**2 * (4 + 4 - at.b)
    components = (
        Component("activations", kept, why),
        Component("passing", scores + at.hidden, "gradients of the scores and their softmax"),
    )
    return Moment("eager attention's backward pass", components, gathered_layers=2)


def _evaluation(at: _Sizes) -> Moment:
    """A forward pass that keeps nothing."""
    logits = at.logits(at.b + 4 + 4)
    # PEFT's own product dequantises the whole matrix.
    largest = max(rows * cols for rows, cols in at.shape.linears.values())
    matrix = largest * at.b if isinstance(at.spec.quantization, Nf4Quantization) else 0
    layer = matrix + 3 * at.inner + 4 * at.hidden
    if at.attention == "eager":
        layer += at.rows * at.shape.num_heads * at.seq**2 * (4 + 2 * at.b)
    why = f"{at.rows} sequences in a forward pass"
    if logits.bytes > layer:
        components: tuple[Component, ...] = (Component("activations", at.hidden, why), logits)
    else:
        components = (Component("activations", layer, why),)
    return Moment("evaluation", components, gathered_layers=2)


def _kept(at: _Sizes) -> tuple[int, str]:
    """Bytes that all layers keep between their forward and their backward pass."""
    layers, mask = at.shape.num_layers, at.rows * at.seq**2 if at.masked else 0
    if at.spec.model.gradient_checkpointing:
        return layers * at.hidden + mask, f"{layers} layer inputs of {at.tokens:,} tokens"
    kept = layers * (layer_activation_bytes(at) + at.copies()) + mask
    return kept, f"{layers} whole layers of {at.tokens:,} tokens"


def layer_activation_bytes(at: _Sizes) -> int:
    """Bytes that one decoder layer keeps for its backward pass.

    A product with an adapter (qlora_dist.train.lora) keeps its input, which others may keep too;
    PEFT's keeps the input behind the dropout instead, and a mask of bytes. A frozen one keeps
    nothing.
    """
    spec, shape, b = at.spec, at.shape, at.b
    hidden, inner = shape.hidden_size, shape.intermediate_size
    r = at.lora.r if at.lora else 0
    query, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    # All keep their inputs where their weights are trained.
    targets = set(layer_targets(spec, shape) if at.lora else shape.linears)
    norms = 2 * _norm_bytes(at, hidden)
    if shape.qk_norm:
        norms += _norm_bytes(at, query + key_value)
    mlp = b * (2 if at.fused else 3) * inner  # gate, up, and transformers' silu(gate)

    def adapter_inputs(width: int, names: set[str], *, kept: bool = False) -> int:
        fed = len(names & targets)
        if fed and at.dropout and not at.fused:
            return fed * width * (1 + b)
        return b * width * (fed > 0 and not kept)

    inputs = (
        adapter_inputs(hidden, {"q_proj", "k_proj", "v_proj"})
        # It is given attention's output, which attention keeps.
        + adapter_inputs(query, {"o_proj"}, kept=True)
        + adapter_inputs(hidden, {"gate_proj", "up_proj"})
        + adapter_inputs(inner, {"down_proj"})
    )
    a_token = norms + mlp + inputs + b * r * len(targets)
    return at.tokens * a_token + _attention_bytes(at, query, key_value)


def _norm_bytes(at: _Sizes, width: int) -> int:
    """Bytes that a norm keeps of a token: its input, which transformers' has in fp32."""
    return (at.b if at.fused else 4) * width


def _attention_bytes(at: _Sizes, query: int, key_value: int) -> int:
    """Bytes that attention keeps: its inputs and its output, and what its kernel needs."""
    heads, b, square = at.shape.num_heads, at.b, at.rows * at.seq**2
    # Kernels that do not know grouped heads are given keys and values repeated.
    repeated = at.attention != "sdpa" or at.masked
    inputs = b * (2 * query + 2 * (query if repeated else key_value))
    if at.attention == "eager":
        # The softmax in fp32, and again in the dtype of the product.
        return at.tokens * inputs + heads * square * (4 + b)
    # One log-sum a token and head; the mask as numbers to add.
    return at.tokens * (inputs + 4 * heads) + (square * b if at.masked else 0)
