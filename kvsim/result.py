"""Result: what a run leaves behind, as columns."""
import numpy as np
from kvsim.engine import state as st

def outcome_and_cause(run):
    """(outcome codes, cause codes), with what the end of the run left over as `unfinished`."""
    table = run.state.requests
    outcomes, causes = table["outcome"].copy(), table["cause"].copy()
    left = outcomes == st.NO_OUTCOME
    outcomes[left] = st.UNFINISHED
    causes[left] = st.CAUSE_HORIZON if run.ended == "horizon" else st.CAUSE_STALLED
    return outcomes, causes
