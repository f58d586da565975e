//! A log that nobody read for a while says how much of it is missing, once it is read again.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use nbd_server::log_queue::{LogQueue, MAX_BYTES};

#[test]
fn lines_that_did_not_fit_are_told_of_in_the_form_that_lines_have() {
    let text = Arc::new(Mutex::new(String::new()));
    let to = Arc::clone(&text);
    let queue = LogQueue::new(move |line| to.lock().unwrap().push_str(&String::from_utf8_lossy(line)));
    tracing_subscriber::fmt().json().with_writer(queue.clone()).init();
    // Nobody reads.
    let reading = text.lock().unwrap();
    let long = "x".repeat(MAX_BYTES / 16);
    for _ in 0..20 {
        tracing::warn!("{long}");
    }
    assert!(!queue.flush(Duration::from_millis(1)));
    drop(reading);
    while !queue.flush(Duration::from_secs(60)) {}
    let text = text.lock().unwrap();
    let written = text.lines().filter(|line| line.contains(&long)).count();
    let said = text.lines().last().unwrap();
    assert!(said.starts_with('{') && said.contains(&format!("\"left_out\":{}", 20 - written)), "{said}");
    assert!(written < 20);
}
