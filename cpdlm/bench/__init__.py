"""What measures a decoder: timers, interleaved repeats, intervals."""
