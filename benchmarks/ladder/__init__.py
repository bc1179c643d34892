"""The ladder: decoders and a convolutional network of growing size, trained by every method on real data."""
