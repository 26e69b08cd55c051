"""What a change would leave is checked again, whatever the control plane says."""

from pathlib import Path

import pytest

from relay.errors import RuleError
from relay.messages import ApplyRules
from relay.rules import Output, Rule
from relay.supervisor.rulebook import RuleBook
from relay.supervisor.state import state_file


def test_an_address_written_oddly_closes_no_loop(tmp_path: Path) -> None:
    book = RuleBook((), state_file(None, tmp_path / "control.sock"))
    book.rules = {"a": Rule(rule_id="a", input_group="ff3e::2", input_port=1, outputs=(Output("ff3e::1", 1, "x"),))}
    odd = Rule(rule_id="b", input_group="FF3E:0::1", input_port=1, outputs=(Output("ff3e::0002", 1, "x"),))
    with pytest.raises(RuleError, match="cycle through rules b -> a -> b"):
        book.after(ApplyRules(1, add=(odd,)), ["x"])
    taken = book.after(ApplyRules(1, add=(odd,)), ["elsewhere"])
    assert taken["b"].input_group == "ff3e::1"
