//! Clients beside others: what one of them holds, known or not, is its own connection's part, and the rest is the others'.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use capsieve_rpc::v1;
use capsieve_rpc::v1::scoring_service_client::ScoringServiceClient;

use super::perimeter::{connect, guarded, trusted};
use super::server::{Shards, wait};

/// Far below the timeouts of the tests' servers.
const SOON: Duration = Duration::from_secs(10);
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// A connection without a request: silent, or one that has spoken HTTP/2.
fn stranger(address: &str, number: usize) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    if number.is_multiple_of(2) {
        stream.write_all(PREFACE).unwrap();
    }
    stream
}

fn is_closed(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    loop {
        match stream.read(&mut [0; 1024]) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

#[test]
fn connections_of_strangers_keep_nobody_out() {
    let limits = ["--max-connections", "4", "--handshake-timeout", "600", "--keepalive", "600"];
    let server = guarded(&Shards::new(&[]), &limits);
    let mut strangers: Vec<TcpStream> = (0..4).map(|number| stranger(&server.address, number)).collect();
    wait(async {
        let mut clients = Vec::new();
        for round in 0..3 {
            let begun = Instant::now();
            let mut client = ScoringServiceClient::new(connect(&server).await);
            assert!(client.get_model_info(trusted(v1::GetModelInfoRequest {})).await.is_ok());
            assert!(begun.elapsed() < SOON, "round {round}: {:?}", begun.elapsed());
            clients.push(client);
            // They come again.
            for (number, one) in strangers.iter_mut().enumerate().filter(|(_, one)| is_closed(one)) {
                *one = stranger(&server.address, number);
            }
        }
        // Who has called stays.
        tokio::time::sleep(Duration::from_millis(200)).await;
        for client in &mut clients {
            assert!(client.get_model_info(trusted(v1::GetModelInfoRequest {})).await.is_ok());
        }
        assert_eq!(strangers.iter_mut().filter(|one| !is_closed(one)).count(), 1, "one place is left for them");
    });
}
