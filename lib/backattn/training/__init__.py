"""Training adapters and small models."""

from backattn.training.batches import first_tokens as first_tokens
from backattn.training.batches import numbers as numbers
from backattn.training.loop import Recipe as Recipe
from backattn.training.loop import train as train
