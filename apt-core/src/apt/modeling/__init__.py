"""From providers to a model: the builder, the block, the decoder, and the parts that providers made."""
