"""elasticrec: elastic training, compression and real-time serving of recommendation models on Ray."""

__version__ = "0.1.0"
