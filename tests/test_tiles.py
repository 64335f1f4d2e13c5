"""The cost model that chooses tiles and splits of sparse products."""

import pytest

from sdgp_accel.backends import tiles
from sdgp_accel.backends.tiles import SM80, SM80_ANY, SM80_SMALL, SM90, rank_tilings

FAMILIES = {"SM90": SM90, "SM80": SM80, "SM80_SMALL": SM80_SMALL, "SM80_ANY": SM80_ANY}


def first(*arguments, **options):
    return rank_tilings(*arguments, **options)[0]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("shape", [(25088, 1024, 4096), (1024, 1024, 25088), (64, 64, 8), (1, 8, 1)])
def test_tilings_are_of_the_family_and_within_limits(family, shape):
    for product in ("dgrad", "wgrad"):
        for tiling in rank_tilings(family, product, *shape, 108):
            tile = tiling.tile.removesuffix(family.suffix)
            assert (tile, tiling.cluster_size) in {(str(tile), tile.cluster) for tile in getattr(family, product)}
            assert tiling.family == family.name
            assert 1 <= tiling.splits <= (max(1, -(-shape[2] // tiles.TILE_K)) if product == "wgrad" else 1)
            assert tiling.group_n >= 1


def test_every_tiling_has_an_instance():
    from cutlass_ops.build_kernels import INSTANCES

    for family in FAMILIES.values():
        for product in ("dgrad", "wgrad"):
            for conv in ("", "conv_"):
                for tiling in rank_tilings(family, product, 1000, 1000, 1000, 108, conv=conv != ""):
                    for dtype in ("bf16", "f16"):
                        source = INSTANCES / f"{tiling.family}_{conv}{product}_{dtype}_{tiling.tile}.cu"
                        assert source.exists()
                        assert ("PingPong" in source.read_text()) == ("pingpong" in tiling.tile)


def test_narrow_layers_get_narrow_tiles():
    # 3x3 convolutions of 64 channels at 56x56 pixels, batch 256.
    assert first(SM90, "dgrad", 802816, 64, 576, 132).tile == "256x64_pingpong"
    assert first(SM90, "wgrad", 64, 576, 802816, 132, conv=True).tile == "64x192_pingpong"


def test_one_tile_is_split_over_all_multiprocessors():
    assert first(SM90, "wgrad", 64, 64, 802816, 132).splits == 132


def test_a_single_row_of_tiles_needs_no_cluster():
    assert first(SM90, "wgrad", 128, 1152, 200704, 132).cluster_size == 1
    assert first(SM90, "dgrad", 25088, 1024, 4096, 132).cluster_size == 2


def test_gathered_operands_prefer_narrow_tiles():
    assert first(SM90, "wgrad", 256, 2304, 131072, 132, conv=True).tile == "256x128"


@pytest.mark.parametrize("family", [SM90, SM80], ids=["SM90", "SM80"])
def test_small_outputs_of_long_sums_are_split(family):
    assert first(family, "wgrad", 1024, 1024, 25088, 108, shares=False).splits > 1
    assert first(family, "wgrad", 8192, 8192, 8192, 108).splits <= 2


def test_a_last_round_that_leaves_many_idle_is_shared():
    """24 x 4 tiles of 128x256 are 48 units for 66 clusters; 32 x 4 nearly fill them."""
    shared = first(SM90, "wgrad", 3072, 1024, 25088, 132)
    assert (shared.tile, shared.cluster_size, shared.splits) == ("128x256", 2, 1)
    assert 0.7 < shared.owned_steps / (25088 / tiles.TILE_K) < 48 / 66 + 0.02
    assert first(SM90, "wgrad", 4096, 1024, 25088, 132).owned_steps == 0
    assert tiles.workspace_bytes(shared, 3072 * 1024, 132) == 132 * (128 * 256 + 8) * 4


@pytest.mark.parametrize("shape", [(3072, 1024, 25088), (1024, 1024, 256), (8448, 256, 1000), (64, 64, 100)])
@pytest.mark.parametrize("product", ["dgrad", "wgrad"])
def test_only_last_rounds_that_have_room_are_shared(product, shape):
    m, n, k = shape
    for family in FAMILIES.values():
        unshared = rank_tilings(family, product, *shape, 132, shares=False)
        assert all(tiling.owned_steps == 0 for tiling in unshared)
        for tiling in rank_tilings(family, product, *shape, 132):
            if tiling.owned_steps == 0:
                assert tiling in unshared
            else:
                rows, columns = map(int, tiling.tile.split("x"))
                units = -(-m // (rows * tiling.cluster_size)) * -(-n // columns)
                assert family is SM90
                assert units % (132 // tiling.cluster_size) > 0
                assert 1 <= tiling.owned_steps < -(-k // tiles.TILE_K)
                assert tiling.splits == 1


def test_one_multiprocessor_gets_no_cluster():
    assert all(tiling.cluster_size == 1 for tiling in rank_tilings(SM90, "dgrad", 1000, 256, 1024, 1))


def test_tiles_follow_the_shape():
    assert first(SM80, "dgrad", 100000, 64, 256, 108).tile == "128x64"
    assert first(SM80, "wgrad", 64, 576, 200704, 108).tile == "64x128"
    assert first(SM80, "dgrad", 100000, 4096, 4096, 108).tile == "256x128"
    assert first(SM80_SMALL, "dgrad", 100000, 4096, 4096, 108).tile == "128x128"
