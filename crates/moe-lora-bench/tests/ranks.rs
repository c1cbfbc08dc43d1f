//! `moe-lora-bench ranks` where there are no GPUs to give to the ranks: threads on the processor.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

use std::process::Command;

#[test]
fn ranks_on_the_processor_are_right_and_hear_of_the_one_that_dies() {
    for (arguments, ranks) in [(&["--tp", "1"][..], 1), (&["--tp", "2", "--ep", "2", "--fully-sharded"], 4)] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moe-lora-bench"));
        let output = command.args(["ranks", "--cpu", "--adapters", "2"]).args(arguments).output().unwrap();
        let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{text}{errors}");
        assert_eq!(text.matches(" is gone").count(), ranks - 1, "{text}");
        assert!(text.contains("20 batches while adapters were replaced"), "{text}");
    }
}
