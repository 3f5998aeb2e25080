"""From a data spec to batches: stores, index, plan, stream, decoding and crops. See docs/streaming.md."""
