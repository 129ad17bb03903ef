"""Splits: which pictures are trained on, validated on and tested on (layer 2)."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from ipx2p.data.prepare.fingerprints import near_copies
from ipx2p.errors import InputError
from ipx2p.files import hash_bytes


def check_shares(shares: Sequence[float]) -> None:
    """Raise InputError unless the shares are three numbers that leave something to train on."""
    if len(shares) != 3 or any(not 0 <= share < 1e100 for share in shares) or not shares[0]:
        raise InputError(
            f"the shares of train, val and test are {[*shares]}, expected three numbers that are 0 "
            "or more, the first above 0"
        )


def assign_splits(
    groups: Mapping[str, str | None],
    fingerprints: Mapping[str, str],
    *,
    together: Iterable[tuple[str, str]] = (),
    shares: Sequence[float],
    seed: int,
) -> dict[str, str]:
    """The split of each group of pairs (a source picture, a scene).

    The split depends on a hash of the group's name and the seed, not on other groups: so data sets
    made from the same photographs split them alike, and can be mixed. Groups with near copies of
    one picture go together. Of three or more groups, each split with a share gets at least one.

    Args:
        groups: name -> its published split, None if it has none. Without a published validation
            split, a share of the published training groups becomes it.
        fingerprints: name -> the fingerprint of its picture, for those that have one.
        together: pairs of groups that share a picture.
        shares: of train, val and test, relative to one another.
    """
    check_shares(shares)
    published = set(groups.values()) - {None}
    train, val, test = (share / sum(shares) for share in shares)
    free = [name for name, split in groups.items() if split is None]
    if published and "val" not in published and not free:
        free = [name for name, split in groups.items() if split == "train"]
        train, val, test = train + test, val, 0.0
    places = _places(free, fingerprints, together, seed)
    splits = {
        name: "test" if place < test else "val" if place < test + val else "train"
        for name, place in places.items()
    }
    for split, share in (("train", train), ("val", val), ("test", test)):
        if share and split not in splits.values() and len({*places.values()}) >= 3:
            split_of = {place: splits[name] for name, place in places.items()}
            [(largest, _)] = Counter(split_of.values()).most_common(1)
            moved = min(place for place, at in split_of.items() if at == largest)
            splits |= {name: split for name, place in places.items() if place == moved}
    return {name: splits.get(name) or groups[name] for name in groups}


def hash_share(*parts: object) -> float:
    """A number in [0, 1) that looks random and is always the same for the same parts."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hash_bytes(text.encode(), 8), "little") / 2**64


def _places(
    names: Sequence[str],
    fingerprints: Mapping[str, str],
    together: Iterable[tuple[str, str]],
    seed: int,
) -> dict[str, float]:
    """The place of each group in [0, 1); groups with the same picture or near copies share one."""
    leader = {name: name for name in names}

    def find(name: str) -> str:
        while leader[name] != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    known = sorted(name for name in names if name in fingerprints)
    links = [(known[a], known[b]) for a, b in near_copies([fingerprints[name] for name in known])]
    links += [(a, b) for a, b in together if a in leader and b in leader]
    for a, b in links:
        first, second = sorted((find(a), find(b)))
        leader[second] = first
    return {name: hash_share(seed, "split", find(name)) for name in names}
