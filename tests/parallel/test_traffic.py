"""No needless collective: messages and bytes of one training step equal the published formulas.

Per layer and micro batch, tp all-reduces of s b h elements: 2 forward + 2 backward
(arXiv:1909.08053 § 3); with sequence parallelism 10 all-gathers and reduce-scatters, as Megatron
gathers column inputs again in backward (arXiv:2205.05198 § 4.2.2), 12 where the backward is split.
Embedding, head, loss and one collective for the sums of loss and gradient norm come on top.
"""

from collections import Counter

import pytest

from megatron_lite.train.ending.stop import StopVote
from tests.support.axes import FULL, PP, SCHEDULE, SP, TP, ZERO
from tests.support.spawn import spawn
from tests.support.traffic import LAYERS, B, H, S, traffic

ACTIVATION = S * B * H * 4  # bytes of one fp32 activation
TOKENS = S * B * 4


# over the world: loss, count, squared norm, ranks with bad gradients, and the stop votes
ALWAYS = Counter({("all-reduce", (4 + len(StopVote._fields)) * 8): 1})
LOSS = Counter({("all-reduce", TOKENS): 3})  # largest, sum of exponentials, the label's


def test_tensor_parallel_reduces_four_activations_a_layer() -> None:
    for seen, _ in spawn(traffic, 2, {TP: 2}):
        embedding, head = 1, 1
        activations = Counter({("all-reduce", ACTIVATION): 4 * LAYERS + embedding + head})
        assert seen == activations + LOSS + ALWAYS


def test_sequence_parallel_moves_ten_slices_a_layer() -> None:
    for seen, _ in spawn(traffic, 2, {TP: 2, SP: True}):
        # head: gathered forward, again backward, scattered; embedding: scattered, gathered
        assert seen["all-gather", ACTIVATION] == 6 * LAYERS + 2 + 1
        assert seen["reduce-scatter", ACTIVATION] == 4 * LAYERS + 1 + 1
        norms_and_row_biases = (2 * 2 + 2) * H * LAYERS + 2 * H
        partial = Counter({("all-reduce", 4 * (norms_and_row_biases + S * H)): 1})
        rest = seen - Counter(
            {key: n for key, n in seen.items() if key[1] == ACTIVATION and key[0] != "all-reduce"}
        )
        assert rest == partial + LOSS + ALWAYS


ZB_H1 = {SCHEDULE: "zb-h1"}
SPLIT = {"parallel__distribute_saved_activations": True}
MLP = {"parallel__recompute_granularity": "selective", "parallel__recompute_modules": ["mlp"]}


SP_ON = {SP: True}
# what changes, and the all-reduces, all-gathers, reduce-scatters of one activation, each per layer
# and micro batch, then for the head
ACTIVATIONS = {
    "tp": ({}, (4, 0, 0), (1, 0, 0)),
    "split backward": (ZB_H1, (4, 0, 0), (1, 0, 0)),
    "full": (FULL, (4 + 2, 0, 0), (1, 0, 0)),
    "full, kept in slices": (FULL | SPLIT, (4 + 2, 1, 0), (1, 0, 0)),
    "mlp again": (MLP, (4, 0, 0), (1, 0, 0)),  # ends before the sum that nobody needs
    "sp": (SP_ON, (0, 6, 4), (0, 2, 1)),
    # W gathers what it needs: the inputs of two columns, and the output gradients of two rows again
    "sp, split backward": (SP_ON | ZB_H1, (0, 6 + 2, 4), (0, 2, 1)),
    "sp, full": (SP_ON | FULL, (0, 6 + 2, 4 + 2), (0, 2, 1)),
    "sp, full, split backward": (SP_ON | FULL | ZB_H1, (0, 8 + 2, 4 + 2), (0, 2, 1)),
    "sp, mlp again": (SP_ON | MLP, (0, 6 + 1, 4 + 1), (0, 2, 1)),
}


def every_traffic(rank, ranks, num):
    """traffic() of all ACTIVATIONS with so many micro batches."""
    batch = {TP: 2, "train__global_batch_size": num * B}
    return {
        name: traffic(rank, ranks, changes | batch)[0]
        for name, (changes, _, _) in ACTIVATIONS.items()
    }


def test_tensor_parallel_activations_by_schedule_and_recomputation() -> None:
    num = 3
    for rank in spawn(every_traffic, 2, num):
        for name, (changes, per_layer, head) in ACTIVATIONS.items():
            embedding = (0, 1, 1) if SP in changes else (1, 0, 0)
            expected = [
                num * (LAYERS * of_layer + of_head + of_embedding)
                for of_layer, of_head, of_embedding in zip(per_layer, head, embedding, strict=True)
            ]
            kinds = ("all-reduce", "all-gather", "reduce-scatter")
            assert [rank[name][kind, ACTIVATION] for kind in kinds] == expected, name


def test_pipeline_sends_one_activation_each_way() -> None:
    both = spawn(traffic, 2, {PP: 2})
    for seen, _ in both:
        assert seen["send", ACTIVATION] == 1
    first = both[0][0]

    expected = Counter({("send", ACTIVATION): 1, ("all-reduce", 61 * H * 4): 1}) + ALWAYS
    assert first == expected


def test_data_parallel_reduces_every_gradient_once() -> None:
    for seen, parameters in spawn(traffic, 2, {}):
        (gradients,) = [key for key in seen if key[1] > 4 * 1000]
        assert gradients[0] == "all-reduce" and seen[gradients] == 1
        assert 4 * parameters <= gradients[1] <= 4 * parameters + 64 * 100  # aligned to 16 elements
        tokens = Counter({("all-reduce", 8): 1})
        assert seen - Counter({gradients: 1}) == tokens + ALWAYS


@pytest.mark.parametrize("ranks", [2, 4])
def test_distributed_optimizer_moves_the_bytes_of_one_all_reduce(ranks) -> None:
    for seen, parameters in spawn(traffic, ranks, {ZERO: 1, "model__vocab_size": 64}):
        large = {key: n for key, n in seen.items() if key[1] > 4 * 1000}
        assert {key[0] for key in large} == {"reduce-scatter", "all-gather"}
        for (_, size), times in large.items():
            assert times == 1 and size == pytest.approx(4 * parameters, rel=0.01)
