"""The paper as runs that anyone can repeat: which, how they are started, what comes of them."""
