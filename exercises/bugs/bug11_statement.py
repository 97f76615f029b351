"""bug11 -- privacy.json: what was planned is what was spent."""
from machinery import statement

STANDS_IN_FOR = "machinery.statement.after"
statement_of = statement.after                                           # the repository's


def after(s, sigma, steps, weights):
    """The privacy statement of a finished run: the plan's figures, and the number of steps that ran."""
    return dict(statement_of(s, sigma, s.steps, weights), steps=steps)
