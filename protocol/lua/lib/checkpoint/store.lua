--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/checkpoint/chunks
--- @include lib/checkpoint/refresh

-- Make a state the checkpoint's: the state itself, or, with chunks > 0, those that are being written.
-- An older release reads only `state` and `crc`: of chunks it must see what it takes for damaged (byte C1 is in no
-- msgpack value, and -1 is no CRC), or it would go on with no state at all.
local function put_state(id, state, crc, chunks, length)
  local name = KEY.checkpoint .. id
  local marks = redis.call('HMGET', name, 'chunks', 'writing')
  if chunks > 0 then
    redis.call('HSET', name, 'state', '\193', 'crc', '-1', 'chunks', marks[2], 'length', length, 'sum', crc)
  else
    redis.call('HSET', name, 'state', state, 'crc', crc)
    if marks[1] then redis.call('HDEL', name, 'chunks', 'length', 'sum') end
    drop_chunks(id, marks[2])
  end
  if marks[2] then redis.call('HDEL', name, 'writing') end
  drop_chunks(id, marks[1])
end

local HOUR_MS = 1000 * HOUR

-- Append outputs at an absolute offset and store a state, for an execution known to be current. Returns the new number
-- of outputs, or nil with the number stored when the offset leaves a gap. Sent again after a lost reply, it changes
-- nothing: what is below the stored offset is there already. point: 'offset', 'seq' and 'at' of the checkpoint that is
-- there, and `claimed`, the ms of this execution's claim; new: what progress.lua takes, by its names, with `kept` for
-- the fields that only stand in the checkpoint; points: a batch of ZADD, for whose sending the caller cares.
local function store(id, point, new, points)
  local name = KEY.checkpoint .. id
  local have, have_seq = number_of(point[1]), number_of(point[2])
  local offset, outputs, seq = tonumber(new.offset), tonumber(new.outputs), tonumber(new.seq)
  if offset > have then return nil, have end
  if outputs > 0 and offset + outputs > have then
    -- Resends are verbatim, so an entry is stored whole or not at all.
    if offset ~= have then return nil, have end
    redis.call('RPUSH', KEY.output .. id, new.blob)
    if have == 0 then redis.call('EXPIRE', KEY.output .. id, DAY) end
    have = have + outputs
  end
  if seq > have_seq then
    redis.call('HSET', name, 'seq', int(seq), 'offset', int(have), 'at', int(now_ms),
      'stepped', int(seq) .. ':' .. new.stepped, unpack(new.kept))
    if new.has_state == '1' then put_state(id, new.state, new.crc, tonumber(new.chunks), new.length) end
    points.add(KEY.checkpoints, now_text, id)
    -- Not at every checkpoint: what lives for a day is told so at an execution's first one, and once in every hour.
    local at = number_of(point[3])
    if at <= number_of(point.claimed) or math.floor(at / HOUR_MS) ~= math.floor(now_ms / HOUR_MS) then refresh(id) end
  end
  return have
end
