"""No page is handed out while anybody uses it, and no key is shared by contents that differ."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memphi.cache.pages import MediaMark, OutOfPagesError, Pages, page_key, page_keys, root_key

ROOT = root_key("adapter", "speech", False, "bf16")


def keys(count, name="k"):
    return [f"{name}{i}".encode() for i in range(count)]


def registered(pages, names):
    """Pages in use under these keys."""
    got = pages.allocate(len(names))
    for page, key in zip(got, names, strict=True):
        pages.register(page, key)
    return got


class PagesMachine(RuleBasedStateMachine):
    """Sequences come, share what others left, grow and go; `held` is what each uses, `content` what pages hold."""

    def __init__(self):
        super().__init__()
        self.pages = Pages(8, 16)
        self.held = []
        self.content = {}  # page -> key

    def pick(self, data):
        return data.draw(st.sampled_from(range(len(self.held))))

    @rule(chain=st.integers(0, 2), count=st.integers(1, 4), new=st.integers(0, 3))
    def start(self, chain, count, new):
        names = keys(count, f"chain {chain}, ")
        found = self.pages.match(names)
        kept = set(self.content.values())
        assert found == next((i for i, name in enumerate(names) if name not in kept), count)
        shared = self.pages.share(names[:found])
        assert [self.content[page] for page in shared] == names[:found]
        self.held.append(shared)
        self.grow(len(self.held) - 1, new)
        for page, name in zip(self.held[-1][found:], names[found:], strict=False):
            self.pages.register(page, name)
            if name not in self.content.values():
                self.content[page] = name

    def grow(self, index, count):
        used = {page for held in self.held for page in held}
        foretold = self.pages.upcoming(count)
        available, users = self.pages.available_pages, Counter(page for held in self.held for page in held)
        if count > available:
            with pytest.raises(OutOfPagesError):
                self.pages.allocate(count)
            assert (self.pages.available_pages, self.pages.used_pages) == (available, len(users))
            return
        free = self.pages.free_pages
        got = self.pages.allocate(count)
        assert len(set(got)) == count
        assert got == foretold or count > free
        assert not used & set(got)
        assert self.pages.free_pages == max(free - count, 0)
        for page in got:
            self.content.pop(page, None)
        self.held[index] = self.held[index] + got

    @precondition(lambda self: self.held)
    @rule(data=st.data(), count=st.integers(0, 5))
    def extend(self, data, count):
        self.grow(self.pick(data), count)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data):
        self.pages.release(self.held.pop(self.pick(data)))

    @rule(count=st.none() | st.integers(0, 5))
    def drop(self, count):
        idle = self.pages.idle_pages
        assert self.pages.drop_idle(count) == (idle if count is None else min(count, idle))
        self.content = {page: key for page, key in self.content.items() if page in self.pages.kept()}

    @rule(capacity=st.integers(0, 20))
    def resize(self, capacity):
        before, free = self.pages.capacity, self.pages.free_pages
        given_up = self.pages.resize(capacity)
        assert given_up == min(max(before - capacity, 0), free)
        assert self.pages.capacity == max(capacity, before - given_up)

    @invariant()
    def all_is_well(self):
        self.pages.check()
        users = Counter(page for held in self.held for page in held)
        assert {page: self.pages.users(page) for page in range(20)} == {page: users[page] for page in range(20)}
        assert self.pages.used_pages == len(users)
        assert self.pages.idle_pages == len(self.content.keys() - users.keys())
        assert self.pages.kept() == users.keys() | self.content.keys()
        counts = self.pages.free_pages + self.pages.idle_pages + self.pages.used_pages
        assert counts == self.pages.capacity
        assert self.pages.match(list(self.content.values())) == len(self.content)


PagesMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestPages = PagesMachine.TestCase


def test_the_lowest_free_numbers_are_given_first():
    pages = Pages(6, 16)
    assert pages.allocate(4) == [0, 1, 2, 3]
    pages.release([1])
    pages.release([0])
    assert pages.allocate(3) == [0, 1, 4]


def test_what_was_released_longest_ago_is_forgotten_first_and_children_before_parents():
    pages = Pages(4, 16)
    first, second = registered(pages, keys(2, "a")), registered(pages, keys(2, "b"))
    pages.release(second)
    pages.release(first)
    assert pages.allocate(1) == [second[1]]
    assert (pages.match(keys(2, "b")), pages.match(keys(2, "a"))) == (1, 2)
    assert pages.drop_idle(2) == 2
    assert (pages.match(keys(2, "b")), pages.match(keys(2, "a"))) == (0, 1)


def test_a_shared_page_is_fresh_again():
    pages = Pages(3, 16)
    a, b = registered(pages, keys(1, "a")), registered(pages, keys(1, "b"))
    pages.release(a)
    pages.release(b)
    pages.release(pages.share(keys(1, "a")))
    pages.drop_idle(1)
    assert (pages.match(keys(1, "a")), pages.match(keys(1, "b"))) == (1, 0)


def test_free_pages_go_before_idle_ones():
    pages = Pages(3, 16)
    pages.release(registered(pages, keys(1)))
    assert pages.allocate(2) == [1, 2]
    assert pages.match(keys(1)) == 1


def test_a_key_keeps_its_first_page():
    pages = Pages(2, 16)
    first, second = registered(pages, keys(1)), registered(pages, keys(1))
    pages.release(second)
    assert (pages.free_pages, pages.idle_pages) == (1, 0)
    assert pages.share(keys(1)) == first


def test_what_cannot_be_shared_changes_nothing():
    pages = Pages(2, 16)
    page = registered(pages, keys(1))
    with pytest.raises(KeyError):
        pages.share(keys(2))
    assert pages.users(page[0]) == 1


def test_growing_takes_back_the_lowest_numbers_given_up():
    pages = Pages(6, 16)
    held = pages.allocate(6)
    pages.release([1, 3, 4])
    assert pages.resize(2) == 3
    assert pages.capacity == 3
    assert pages.resize(5) == 0
    assert pages.allocate(2) == [1, 3]
    assert pages.resize(8) == 0
    assert pages.allocate(3) == [4, 6, 7]
    pages.check()
    assert held == [0, 1, 2, 3, 4, 5]


def test_check_sees_what_is_broken():
    def broken(change):
        pages = Pages(4, 16)
        pages.release(registered(pages, keys(2)))
        pages.allocate(1)
        change(pages)
        with pytest.raises(AssertionError):
            pages.check()

    broken(lambda pages: pages._free.pop())
    broken(lambda pages: pages._users.update({3: 1}))
    broken(lambda pages: pages._users.update({2: 0}))
    broken(lambda pages: pages._keys.update({2: b"another"}))
    broken(lambda pages: pages._pages.popitem())


PARENTS = [
    ("adapter", root_key("another", "speech", False, "bf16")),
    ("no adapter", root_key(None, "speech", False, "bf16")),
    ("adapter named None", root_key("None", "speech", False, "bf16")),
    ("audio head", root_key("adapter", "vision", False, "bf16")),
    ("no audio head", root_key("adapter", None, False, "bf16")),
    ("regime", root_key("adapter", "speech", True, "bf16")),
    ("cache format", root_key("adapter", "speech", False, "fp8")),
]


@pytest.mark.parametrize("root", [root for _, root in PARENTS], ids=[name for name, _ in PARENTS])
def test_every_ingredient_of_the_root_changes_every_key(root):
    assert root != ROOT
    assert len({root for _, root in PARENTS}) == len(PARENTS)
    assert not set(page_keys(root, range(8), (), 4)) & set(page_keys(ROOT, range(8), (), 4))


def test_the_root_is_the_same_in_every_process():
    code = "import sys; from memphi.cache.pages import root_key as key; assert 'torch' not in sys.modules\n"
    code += "print(key('adapter', 'speech', False, 'bf16').hex())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ROOT.hex()


def test_the_parent_changes_a_key():
    assert page_key(b"a", 4, (1, 2), ()) != page_key(b"b", 4, (1, 2), ())
    one, other = (page_keys(ROOT, (first, 2, 3, 4), (), 2) for first in (1, 9))
    assert one[1] != other[1]


@pytest.mark.parametrize("place", range(4))
def test_each_token_changes_a_key(place):
    ids = [5, 6, 7, 8]
    changed = [*ids[:place], 9, *ids[place + 1 :]]
    assert page_key(ROOT, 0, ids, ()) != page_key(ROOT, 0, changed, ())


def test_a_medium_changes_the_keys_of_its_pages_and_of_those_after():
    ids = [1] * 16
    plain, marked = page_keys(ROOT, ids, (), 4), page_keys(ROOT, ids, [MediaMark(6, 4, b"image")], 4)
    assert [a == b for a, b in zip(plain, marked, strict=True)] == [True, False, False, False]


def test_the_digest_of_a_medium_changes_a_key():
    one, other = (page_key(ROOT, 0, [1] * 4, [MediaMark(0, 4, digest)]) for digest in (b"image", b"other"))
    assert one != other


@pytest.mark.parametrize(("start", "mark"), [(4, (0, 12)), (4, (2, 12)), (4, (5, 12)), (4, (4, 3)), (0, (0, 12))])
def test_the_offset_of_a_medium_changes_a_key(start, mark):
    """The page of equal ids and the same parent, at another place of the same medium."""
    usual = page_key(ROOT, 4, [1] * 4, [MediaMark(4, 12, b"image")])
    changed = page_key(ROOT, start, [1] * 4, [MediaMark(*mark, b"image")])
    assert (usual == changed) == (mark[0] == start and mark[1] >= 4)


def test_only_full_pages_have_keys():
    assert [len(page_keys(ROOT, range(n), (), 4)) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert page_keys(ROOT, range(11), (), 4) == page_keys(ROOT, range(8), (), 4)


@st.composite
def prompts(draw):
    """Ids of which few differ, and media that stand in a row; and what every token is made of."""
    content = []
    media = []
    for _ in range(draw(st.integers(0, 4))):
        tokens = draw(st.integers(1, 6))
        if draw(st.booleans()):
            digest = draw(st.sampled_from([b"a", b"b"]))
            media.append(MediaMark(len(content), tokens, digest))
            content += [(7, digest, i) for i in range(tokens)]
        else:
            content += [(draw(st.sampled_from([7, 8])), None, 0) for _ in range(tokens)]
    return [part[0] for part in content], media, content


@given(prompts(), prompts(), st.integers(1, 4))
@settings(max_examples=500)
def test_keys_are_equal_exactly_where_everything_up_to_the_page_is(one, other, page_tokens):
    first, second = (page_keys(ROOT, ids, media, page_tokens) for ids, media, _ in (one, other))
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        end = (i + 1) * page_tokens
        assert (a == b) == (one[2][:end] == other[2][:end])
