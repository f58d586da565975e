//! The documents name what there is, and what they name is there.
#![allow(clippy::unwrap_used, reason = "what a test calls may panic as the test may")]

use std::fs;
use std::path::PathBuf;

use e2e::programs::project_dir;

#[test]
fn the_architecture_page_names_every_crate() {
    let page = fs::read_to_string(project_dir().join("ARCHITECTURE.md")).unwrap();
    for member in members() {
        assert!(page.contains(&format!("`{member}`")), "ARCHITECTURE.md does not say what {member}/ is");
    }
}

#[test]
fn links_between_the_documents_lead_somewhere() {
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split([')', '#', ' ']).next()) {
            let is_ours = !link.is_empty() && !link.contains("://") && !link.starts_with("mailto:");
            let place = page.parent().unwrap().join(link);
            assert!(!is_ours || place.exists(), "{} links to {link}, which is not there", page.display());
        }
    }
}

#[test]
fn source_files_named_in_the_documents_are_there() {
    let mut named = 0;
    for page in pages() {
        let text = fs::read_to_string(&page).unwrap();
        // Every second part stands between backquotes.
        for code in text.split('`').skip(1).step_by(2) {
            let is_path = code.contains('/') && !code.contains([' ', '*', '{', '<', '\n']);
            if is_path && [".rs", ".sh", ".toml"].iter().any(|ending| code.ends_with(ending)) {
                named += 1;
                assert!(
                    project_dir().join(code).exists(),
                    "{} names {code}, which is not there",
                    page.display()
                );
            }
        }
    }
    assert!(named > 0, "the documents name their tests and scripts");
}

/// All documents.
fn pages() -> Vec<PathBuf> {
    let directories = [project_dir().to_owned(), project_dir().join("docs"), project_dir().join("benches")];
    let entries = directories.iter().flat_map(|directory| fs::read_dir(directory).unwrap());
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == "md")).collect()
}

/// The members of the workspace, by the names of their directories.
fn members() -> Vec<String> {
    let text = fs::read_to_string(project_dir().join("Cargo.toml")).unwrap();
    let workspace: toml::Table = text.parse().unwrap();
    let members = workspace["workspace"]["members"].as_array().unwrap();
    members.iter().map(|member| member.as_str().unwrap().to_owned()).collect()
}
