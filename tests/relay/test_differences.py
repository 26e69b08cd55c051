"""Differences of rules field by field, and files that rules are saved to."""

import difflib
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.config import Options
from relay.configfile import parse
from relay.differences import FieldChange, RuleChange, Setting, compare, compare_options
from relay.errors import ConfigError
from relay.rules import Output, Rule, Secondary, fingerprint, merge, parse_output
from relay.saving import replace_file, updated, written


def rule(rule_id: str, *outputs: str, **fields: Any) -> Rule:
    texts = outputs or ("239.2.2.2:6001:eth1",)
    return Rule(
        **{
            "rule_id": rule_id,
            "input_group": "239.1.1.1",
            "input_port": 5001,
            "outputs": tuple(parse_output(text) for text in texts),
            **fields,
        }
    )


def test_rules_are_added_removed_and_changed_field_by_field() -> None:
    running = [rule("gone"), rule("kept"), rule("tv", "239.2.2.2:6001:eth1", "239.2.2.3:6001:eth1")]
    wanted = [rule("new"), rule("tv", "239.2.2.2:6001:eth1:7", "239.2.2.4:6001:eth1", input_port=5002), rule("kept")]
    differences = compare(running, wanted)
    assert ([r.rule_id for r in differences.added], [r.rule_id for r in differences.removed]) == (["new"], ["gone"])
    (change,) = differences.changed
    output = {"group": "239.2.2.3", "port": 6001, "interface": "eth1", "ttl": None, "dscp": None}
    assert change == RuleChange(
        "tv",
        (
            FieldChange("input_port", 5001, 5002),
            FieldChange("outputs[239.2.2.3:6001:eth1]", output, None),
            FieldChange("outputs[239.2.2.2:6001:eth1].ttl", None, 7),
            FieldChange("outputs[239.2.2.4:6001:eth1]", None, {**output, "group": "239.2.2.4"}),
        ),
    )


def test_another_order_of_outputs_is_a_difference() -> None:
    a, b = "239.2.2.2:6001:eth1", "239.2.2.3:6001:eth1"
    (change,) = compare([rule("tv", a, b)], [rule("tv", b, a)]).changed
    assert change.fields == (FieldChange("outputs", [a, b], [b, a]),)


def test_settings_differ_by_what_a_restart_with_the_file_would_bring() -> None:
    running = msgspec.to_builtins(Options(interfaces=("eth0",), ring_mib=32, idle="spin"))
    running = msgspec.json.decode(msgspec.json.encode(running))  # as it comes over the socket
    assert list(compare_options(running, {"interfaces": ("eth0",), "num_workers": 2}, ("idle",))) == [
        Setting("num_workers", None, 2),
        Setting("ring_mib", 32, 16),
    ]


OUTPUTS = st.builds(
    Output,
    st.sampled_from(["239.2.2.1", "239.2.2.2", "10.0.0.7"]),
    st.sampled_from([6001, 6002]),
    st.sampled_from(["eth1", "eth2"]),
    st.sampled_from([None, 7, "decrement"]),
    st.sampled_from([None, 34]),
)
RULES = st.builds(
    Rule,
    rule_id=st.sampled_from(["a", "b", "c", "d", "e"]),
    input_group=st.sampled_from(["239.1.1.1", "239.1.1.2"]),
    input_port=st.sampled_from([5001, 5002]),
    outputs=st.lists(OUTPUTS, min_size=1, max_size=3, unique_by=lambda o: (o.group, o.port, o.interface)).map(tuple),
    input_interface=st.sampled_from([None, "eth0"]),
    source=st.sampled_from([None, "10.0.0.1"]),
    preserve_source=st.booleans(),
)
RULE_SETS = st.lists(RULES, max_size=5, unique_by=lambda rule: rule.rule_id)


@given(RULE_SETS, RULE_SETS)
def test_a_difference_that_is_applied_is_none_any_more(running: list[Rule], wanted: list[Rule]) -> None:
    differences = compare(running, wanted)
    changed = {change.rule_id for change in differences.changed}
    assert all(change.fields for change in differences.changed)
    active = {r.rule_id: r for r in running}
    add, replaced = merge(active, [*differences.added, *(r for r in wanted if r.rule_id in changed)], replace=True)
    assert set(replaced) == changed
    for rule_id in (*replaced, *(r.rule_id for r in differences.removed)):
        del active[rule_id]
    active |= {r.rule_id: r for r in add}
    assert compare(active.values(), wanted).of_rules == 0
    assert fingerprint(active.values()) == fingerprint(wanted)


FILE = """\
# Do not touch
interfaces = ["eth0"]   # the input

# --- cameras ---

# camera one
[[rules]]
rule_id = "a"   # A!
input_group = "239.1.1.1"
input_port = 5001   # by hand
outputs = [
    "239.2.2.1:6001:eth1",   # main
    "239.2.2.2:6001:eth1",   # spare
]

# camera two
[[rules]]
rule_id = "b"
input_group = '239.1.1.2'
input_port = 5001
source = "10.0.0.1"   # only this
outputs = ["239.2.2.2:6001:eth1"]

# twelve more
[[rules]]
rule_id = "c-{n}"
input_group = "239.1.2.0/30"
input_port = "5001-5003"
outputs = ["{group}:{port+1000}:eth1"]
# the end
"""
_, FILED = parse(FILE, "f")


def changes_of(rules: list[Rule]) -> list[str]:
    """What saving these rules removes from the file and adds to it."""
    lines = difflib.ndiff(FILE.splitlines(), updated(FILE, "f", rules).splitlines())
    return [line for line in lines if line[0] in "+-"]


def test_a_file_whose_rules_are_active_is_not_changed() -> None:
    assert changes_of(list(FILED)) == []
    assert updated(FILE.replace("\n", "\r\n"), "f", FILED) == FILE.replace("\n", "\r\n")


def test_a_changed_rule_changes_its_own_keys_and_no_comment() -> None:
    first, second, *rest = FILED
    outputs = (first.outputs[0], Output("239.2.2.3", 6001, "eth1", 9))
    first = msgspec.structs.replace(first, input_port=5005, outputs=outputs)
    second = msgspec.structs.replace(second, source=None, preserve_source=True)
    assert changes_of([first, second, *rest]) == [
        "- input_port = 5001   # by hand",
        "+ input_port = 5005   # by hand",
        '-     "239.2.2.2:6001:eth1",   # spare',
        '+     "239.2.2.3:6001:eth1:9",   # spare',
        '- source = "10.0.0.1"   # only this',
        "+ preserve_source = true",
    ]


def test_an_output_that_is_a_table_is_no_range() -> None:
    table = '{ group = "239.2.2.2", port = 6001, interface = "eth1", dscp = 34 }'
    text = FILE.replace('"239.2.2.2:6001:eth1",   # spare', f"{table},   # spare")
    first, *rest = parse(text, "f")[1]
    changed = msgspec.structs.replace(first, outputs=first.outputs[:1], stall_ms=500)
    saved = updated(text, "f", [changed, *rest])
    assert 'rule_id = "a"   # A!' in saved
    assert '    "239.2.2.1:6001:eth1",   # main' in saved
    assert "stall_ms = 500" in saved


def test_a_second_input_is_saved_changed_and_removed_in_place() -> None:
    first, *rest = FILED
    protected = msgspec.structs.replace(first, secondary=Secondary(input_interface="eth2"), protection="seamless")
    protected = msgspec.structs.replace(protected, input_interface="eth0")
    saved = updated(FILE, "f", [protected, *rest])
    assert 'secondary = {input_interface = "eth2"}' in saved
    moved = msgspec.structs.replace(protected, secondary=Secondary(input_group="239.1.9.1", input_port=7))
    again = updated(saved, "f", [moved, *rest])
    assert 'secondary = {input_group = "239.1.9.1", input_port = 7}' in again
    assert "input_port = 5001   # by hand" in again
    (changed,) = compare([protected, *rest], [moved, *rest]).changed
    (field,) = changed.fields
    assert (field.running, field.file) == ({"input_interface": "eth2"}, {"input_group": "239.1.9.1", "input_port": 7})
    assert parse(written(moved), "f")[1] == (moved,)
    plain = updated(again, "f", [first, *rest])
    assert "secondary" not in plain
    assert "protection" not in plain


def test_a_second_input_that_is_a_table_of_its_own_is_kept_and_changed() -> None:
    text = FILE + '[rules.secondary]\ninput_group = "239.1.9.{g4}"   # beside\n'
    text = text.replace("# the end\n", 'protection = "seamless"\n')
    rules = parse(text, "f")[1]
    assert {rule.secondary.input_group for rule in rules if rule.secondary} == {f"239.1.9.{n}" for n in range(4)}
    assert updated(text, "f", rules) == text
    assert updated(text, "f", rules[:3]).count("239.1.9.0") == 1


def test_a_removed_rule_goes_with_its_comment_and_no_other() -> None:
    removed = [line.removeprefix("- ") for line in changes_of([r for r in FILED if r.rule_id != "b"])]
    assert "\n".join(removed).strip() == FILE[FILE.index("# camera two") : FILE.index("# twelve")].strip()


def test_new_rules_come_last_and_what_is_left_of_a_range_is_written_out() -> None:
    new = rule("new", *(f"239.3.1.{i}:6001:eth1" for i in range(9)))
    told: list[str] = []
    text = updated(FILE, "f", [*(r for r in FILED if r.rule_id != "c-5"), new], told.append)
    assert told == [
        "f:25: rules[2]: rule c-5 is gone, which its range of 12 rules can't say: written out as 11 entries"
    ]
    assert text.startswith(FILE[: FILE.index('[[rules]]\nrule_id = "c-{n}')])
    assert text.count("[[rules]]") == 2 + 11 + 1
    assert text.index("# the end") < text.index('rule_id = "new"')


def test_only_a_range_that_is_written_out_is_told_of() -> None:
    told: list[str] = []
    first, second, *rest = FILED
    changed = [msgspec.structs.replace(r, stall_ms=500) if r.rule_id in ("c-1", "c-12") else r for r in rest[:-1]]
    updated(FILE, "f", [first, second, *changed], told.append)
    assert told == [
        "f:25: rules[2]: rule c-1 has changed, rule c-12 is gone, which its range of 12 rules can't say: "
        "written out as 11 entries"
    ]
    told.clear()
    updated(FILE, "f", [first, rest[7]], told.append)
    updated(FILE, "f", [second], told.append)  # a range that is gone as a whole
    updated(FILE, "f", [first, msgspec.structs.replace(second, stall_ms=500), *rest], told.append)
    assert told == [
        "f:25: rules[2]: rules c-1, c-2, c-3 and 8 more are gone, which its range of 12 rules can't say: "
        "written out as 1 entry"
    ]


def test_a_file_that_is_not_right_is_not_saved_to() -> None:
    with pytest.raises(ConfigError, match=r"f:1: colour: unknown key.*must be right before rules are saved"):
        updated("colour = 1\n", "f", FILED)
    inline = 'rules = [{ rule_id = "x", input_group = "239.1.1.1", input_port = 1, outputs = ["239.2.2.2:6001:lo"] }]\n'
    with pytest.raises(ConfigError, match=r"f:1: rules\[0\]: write each rule as \[\[rules\]\]"):
        updated(inline, "f", [])


@settings(max_examples=60)
@given(RULE_SETS, RULE_SETS)
def test_what_is_saved_is_what_is_read_and_saving_again_changes_nothing(former: list[Rule], active: list[Rule]) -> None:
    text = updated("# head\nring_mib = 1\n", "f", former)
    text = updated(text, "f", active)
    options, rules = parse(text, "f")
    assert compare(rules, active).of_rules == 0
    assert options == {"ring_mib": 1}
    assert text.startswith("# head\nring_mib = 1\n")
    assert updated(text, "f", active) == text


COMMENTS = ("# Do not touch", "# the input", "# --- cameras ---", "# the end")  # of no entry


@settings(max_examples=60)
@given(st.lists(st.sampled_from(FILED), unique=True), st.lists(OUTPUTS, max_size=3), RULE_SETS)
def test_whatever_becomes_of_a_file_the_comments_of_no_entry_and_of_untouched_ones_stay(
    kept: list[Rule], outputs: list[Output], new: list[Rule]
) -> None:
    active = {r.rule_id: r for r in [*kept, *new]}
    if outputs and kept:
        places = {(o.group, o.port, o.interface): o for o in (*kept[0].outputs, *outputs)}
        active[kept[0].rule_id] = msgspec.structs.replace(kept[0], outputs=tuple(places.values()))
    text = updated(FILE, "f", active.values())
    assert compare(parse(text, "f")[1], active.values()).of_rules == 0
    assert all(comment in text for comment in COMMENTS)
    for rule_id, comment in (("a", "# main"), ("a", "# by hand"), ("b", "# only this")):
        if active.get(rule_id) == {r.rule_id: r for r in FILED}[rule_id]:
            assert comment in text


def test_a_file_is_replaced_behind_its_link_and_keeps_its_mode(tmp_path: Path) -> None:
    file, link = tmp_path / "relay.toml", tmp_path / "link.toml"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to(file)
    replace_file(link, "new")
    assert link.is_symlink()
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == ("new", 0o640)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.toml", "relay.toml"]
    with pytest.raises(ConfigError, match=r"nowhere.* not written: No such file or directory"):
        replace_file(tmp_path / "nowhere" / "relay.toml", "new")
