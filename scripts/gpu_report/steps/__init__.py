"""The steps themselves, one file for each kind of thing that is shown."""
