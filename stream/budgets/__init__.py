"""From a deadline in milliseconds to a token count: pure state machines, no clock inside."""
