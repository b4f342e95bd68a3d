--- @include lib/numbers

-- A state above 1 MiB stands in chunks of its own. Two marks in the checkpoint, each `<execution>:<seq>:<chunks>`,
-- say which: `chunks` those that are committed, `writing` those that are being written. With their help whatever
-- drops a checkpoint drops all of its keys; what a crash leaves besides has a TTL.
local function chunk_name(id, seq, number)
  return KEY.chunk .. id .. ':' .. seq .. ':' .. int(number)
end

-- Delete the chunks that a mark names, but for one, `but` of the checkpoint `seq`.
local function drop_chunks(id, mark, seq, but)
  local old, chunks = string.match(mark or '', ':(%d+):(%d+)$')
  for number = 1, math.min(number_of(chunks), 65536) do
    if old ~= seq or number ~= tonumber(but) then redis.call('UNLINK', chunk_name(id, old, number)) end
  end
end

-- Before the hash goes, which has the marks.
local function drop_all_chunks(id)
  local marks = redis.call('HMGET', KEY.checkpoint .. id, 'chunks', 'writing')
  drop_chunks(id, marks[1])
  drop_chunks(id, marks[2])
end
