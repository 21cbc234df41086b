"""Settings of speculative decoding, written as the engines that people serve with take them."""
