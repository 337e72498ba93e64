"""Programs as text: loops are counted as often as they run, sizes and groups are read in every spelling."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from openo3_jax.plan import hlo

# A loop of 5 runs, in whose body is a loop of 3, written as the GPU compiler does; sums by hand below.
PROGRAM = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[], /*index=1*/bf16[8,16]{1,0}) parameter(0)
  %start = ((bf16[2,16]{1,0:T(8,128)(2,1)}), (bf16[8,16]{1,0:T(8,128)(2,1)})) all-gather-start(%x), replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
  %done = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather-done(%start)
  %moved = bf16[8,16]{0,1} copy(%done)
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%i, %done)
}

%inner_condition (p: (s32[], bf16[8,16])) -> pred[] {
  %p = (s32[], bf16[8,16]{1,0}) parameter(0)
  %bound = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%outer (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[], bf16[8,16]{1,0}) parameter(0)
  %loop = (s32[], bf16[8,16]{1,0}) while(%p), condition=%inner_condition, body=%inner
  %sum.1 = f32[4,4]{1,0} all-reduce(%y), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%i, %z)
}

%open (p: (s32[])) -> (s32[]) {
  %swap = u8[32]{0} collective-permute(%w), source_target_pairs={{0,1},{1,0}}
  ROOT %t = (s32[]) tuple(%i)
}

ENTRY %main (p: bf16[8,16]) -> bf16[8,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  %logits = f32[6,96]{1,0} dot(%p, %q)
  %head = f32[32,96]{1,0} copy(%r)
  %scatter = f32[2,4]{1,0} reduce-scatter(%logits), replica_groups=[2,4]<=[8], to_apply=%add
  %outer_loop = (s32[], bf16[8,16]{1,0}) while(%t), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %until = (s32[]) while(%t2), condition=%c2, body=%open
  ROOT %whole = bf16[64]{0} all-gather(%o), replica_groups=[1,8]<=[8], dimensions={0}
}
"""  # noqa: E501


def test_collectives_by_hand():
    found = {one.kind: one[1:] for one in hlo.collectives(PROGRAM, unknown_trips=7)}
    assert found == {
        "all-gather": (16, 15 * 8 * 16 * 2 + 128, 15 * 8 * 16 * 2 * 3 // 4 + 128 * 7 // 8),
        "all-reduce": (5, 5 * 64, 5 * 96),
        "reduce-scatter": (1, 32, 96),
        "collective-permute": (7, 7 * 32, 7 * 32),
    }


def test_what_must_not_be_in_a_program():
    assert hlo.gathered_outside_loops(PROGRAM) == 128
    assert hlo.most_logits(PROGRAM, vocab=96, dims={32}) == 6
    assert hlo.most_logits(PROGRAM, vocab=96, dims=set()) == 32
    assert hlo.copied_in_loops(PROGRAM, at_least=256, vocab=96) == 256
    assert hlo.copied_in_loops(PROGRAM, at_least=257, vocab=96) == 0
    assert hlo.copied_in_loops(PROGRAM, at_least=256, vocab=16) == 0


# A loop that reads an array of 256 bytes in five ways; two of them store it once more.
READS = """HloModule jit_g

%relayout (p: bf16[8,16]) -> bf16[8,16] {
  ROOT %c = bf16[8,16]{0,1:T(8,128)(2,1)} copy(%p)
}

%product (p: bf16[8,16]) -> bf16[8,16] {
  %inside = bf16[8,16]{0,1:T(8,128)(2,1)} fusion(%p), kind=kLoop, calls=%relayout
  ROOT %d = bf16[8,16]{1,0:T(8,128)(2,1)} convolution(%inside, %q)
}

%stored (p: bf16[8,16]) -> bf16[8,16] {
  ROOT %s = bf16[8,16]{0,1:T(8,128)(2,1)} copy(%p)
}

%body (t: (s32[])) -> (s32[]) {
  %read = bf16[8,16]{1,0:T(8,128)(2,1)} fusion(%x), kind=kOutput, calls=%product
  %again = bf16[8,16]{1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%stored
  %fetch = (bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, bf16[8,16]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x)
  %back = (bf16[8,16]{1,0:T(8,128)(2,1)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) copy-start(%y)
  %fetched = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} copy(%x)
  ROOT %next = (s32[]) tuple(%i)
}

ENTRY %main (p: bf16[8,16]) -> (s32[]) {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %loop = (s32[]) while(%t), condition=%c, body=%body
}
"""


def test_what_is_read_is_not_copied():
    assert hlo.copied_in_loops(READS, at_least=256, vocab=96) == 2 * 256
    assert hlo.copied_in_loops(READS.replace("S(1)", ""), at_least=256, vocab=96) == 4 * 256
    assert hlo.copied_in_loops(READS.replace("calls=%stored", "calls=%product"), at_least=256, vocab=96) == 256


@pytest.mark.parametrize(("element", "sizes", "expected"), [("bf16", (2, 3), 12), ("pred", (5,), 5), ("f32", (), 4)])
def test_bytes(element, sizes, expected):
    assert hlo.num_bytes(element, sizes) == expected


def test_a_program_of_this_machine():
    """A scan over four layers, each gathered over eight devices."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    split = PartitionSpec(None, "x")

    @partial(jax.shard_map, mesh=mesh, in_specs=(split, PartitionSpec()), out_specs=PartitionSpec(), check_vma=False)
    def run(weights, x):
        def layer(x, part):
            return jnp.tanh(x @ jax.lax.all_gather(part, "x", axis=0, tiled=True)), None

        return jax.lax.scan(layer, x, weights)[0]

    weights = jax.device_put(jnp.zeros((4, 64, 64)), NamedSharding(mesh, split))
    text = jax.jit(run).lower(weights, jnp.zeros((128, 64))).compile().as_text()
    size = 4 * 64 * 64 * 4
    assert hlo.collectives(text) == [hlo.Collective("all-gather", 4, size, size * 7 // 8)]
    assert hlo.gathered_outside_loops(text) == 0
