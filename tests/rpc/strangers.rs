//! Clients beside others: what one of them holds, known or not, is its own connection's part, and the rest is the others'.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use capsieve_rpc::v1;
use capsieve_rpc::v1::scoring_service_client::ScoringServiceClient;

use prost::Message;
use tokio::task::JoinSet;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use super::perimeter::{HEALTH_CHECK, SCORE_BATCH, beginning, body, connect, framed, guarded, half, open, trusted};
use super::server::{Server, Shards, of_pairs, pairs, wait};

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

fn is_closed(mut stream: &TcpStream) -> bool {
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
        // One place is left for them, and each has it for a while.
        let begun = Instant::now();
        while strangers.iter().filter(|one| !is_closed(one)).count() != 1 {
            assert!(begun.elapsed() < SOON, "they wait in line still");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
}

#[test]
fn reflection_and_health_checks_of_one_keep_no_other_out() {
    const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    /// Streams of reflection that a connection may have.
    const FEW: usize = 8;
    let server = Server::start(&[]);
    wait(async {
        let mut held = Vec::new();
        // More than a worker once had places for all.
        for _ in 0..40 {
            let channel = connect(&server).await;
            for _ in 0..FEW {
                let (sender, body) = body();
                // list_services
                sender.send(vec![0, 0, 0, 0, 2, 0x3a, 0]).unwrap();
                let answer = open(channel.clone(), REFLECTION, body).await;
                assert!(answer.headers().get("grpc-status").is_none(), "{answer:?}");
                held.push((sender, answer));
            }
            let refused = half(channel.clone(), REFLECTION, Vec::new()).await;
            assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
            // The same connection has other things to ask for.
            let health = HealthClient::new(channel).check(HealthCheckRequest::default()).await;
            assert!(health.is_ok(), "{health:?}");
        }
        let client = connect(&server).await;
        assert!(HealthClient::new(client.clone()).check(HealthCheckRequest::default()).await.is_ok());
        assert!(ScoringServiceClient::new(client).get_model_info(v1::GetModelInfoRequest {}).await.is_ok());
        // Checks that never arrive are few too, with a token or without.
        let channel = connect(&server).await;
        let checks: Vec<_> =
            (0..FEW).map(|_| tokio::spawn(half(channel.clone(), HEALTH_CHECK, vec![0, 0, 0]))).collect();
        tokio::time::sleep(Duration::from_millis(200)).await;
        let refused = half(channel, HEALTH_CHECK, vec![0, 0, 0]).await;
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
        drop((checks, held));
    });
}

#[test]
fn requests_that_one_begins_give_up_its_own() {
    let server = Server::start(&["--max-calls", "2"]);
    wait(async {
        let message = framed(&of_pairs(&pairs(3, 0)).encode_to_vec());
        let (sender, body) = body();
        sender.send(message[..100].to_vec()).unwrap();
        let slow = connect(&server).await;
        let slow = tokio::spawn(async move { open(slow, SCORE_BATCH, body).await });
        tokio::time::sleep(Duration::from_millis(200)).await;
        // Far more than may arrive: eight.
        let flood = connect(&server).await;
        let mut begun = JoinSet::new();
        for _ in 0..100 {
            begun.spawn(half(flood.clone(), SCORE_BATCH, beginning()));
        }
        for _ in 0..93 {
            let given_up = begun.join_next().await.unwrap().unwrap();
            assert_eq!(given_up.code(), Code::ResourceExhausted, "{given_up:?}");
        }
        assert!(begun.try_join_next().is_none() && !slow.is_finished());
        sender.send(message[100..].to_vec()).unwrap();
        drop(sender);
        let answer = slow.await.unwrap();
        assert!(answer.headers().get("grpc-status").is_none(), "{answer:?}");
    });
}
