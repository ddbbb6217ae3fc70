"""The words that a card's parts begin with, by which they are found again when figures are added or a card is shown."""

MADE = "How it was made"  # titles of sections
FURTHER = "Measured further"
USE = "Use"
PAIRS_SECTION = "Frequent pairs of tokens"
BEFORE = "Before it"  # of the runs that the last one goes on from
RECALL_TABLE, POSITION_TABLE = "tokens that are", "tokens at positions"  # first words of tables
