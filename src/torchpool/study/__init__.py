"""Which pooling should I use? Trains the same network once per pooling and says what differs by
more than noise."""
