--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/checkpoint/chunks
--- @include lib/checkpoint/refresh

local HOUR_MS, INDEX_MS = 1000 * HOUR, 10000

-- Whether two moments (ms) lie in different ones of such spans.
local function apart(one, other, span)
  return math.floor(one / span) ~= math.floor(other / span)
end

-- Append outputs at an absolute offset and store a state, for an execution known to be current. Returns the new number
-- of outputs, or nil with the number stored when the offset leaves a gap. Sent again after a lost reply, it changes
-- nothing: what is below the stored offset is there already. point: 'offset', 'seq', 'at', 'chunks' and 'writing' of
-- the checkpoint that is there, and `claimed`, the ms of this execution's claim, unless it has stored something since.
-- new: what progress.lua takes, by its names, with `kept` for the fields that only stand in the checkpoint. points: a
-- batch of ZADD, for whose sending the caller cares.
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
    local stepped, chunks, writing = new.seq .. ':' .. new.stepped, point[4], point[5]
    if new.has_state ~= '1' then
      redis.call('HSET', name, 'seq', new.seq, 'offset', int(have), 'at', now_text, 'stepped', stepped,
        unpack(new.kept))
    elseif new.chunks == '0' then
      redis.call('HSET', name, 'seq', new.seq, 'offset', int(have), 'at', now_text, 'stepped', stepped,
        'state', new.state, 'crc', new.crc, unpack(new.kept))
      if chunks then redis.call('HDEL', name, 'chunks', 'length', 'sum') end
      if writing then drop_chunks(id, writing) end
    else
      -- An older release reads only `state` and `crc`: of chunks it must see what it takes for damaged (byte C1 is in
      -- no msgpack value, and -1 is no CRC), or it would go on with no state at all.
      redis.call('HSET', name, 'seq', new.seq, 'offset', int(have), 'at', now_text, 'stepped', stepped,
        'state', '\193', 'crc', '-1', 'chunks', writing, 'length', new.length, 'sum', new.crc, unpack(new.kept))
    end
    if new.has_state == '1' and writing then redis.call('HDEL', name, 'writing') end
    if new.has_state == '1' and chunks then drop_chunks(id, chunks) end
    -- Not at every checkpoint: the index of their ages is exact to ten seconds, as long as they go on; what lives for a
    -- day is told so at an execution's first one, and once in every hour.
    local at = number_of(point[3])
    local first = at <= number_of(point.claimed)
    if first or apart(at, now_ms, INDEX_MS) then points.add(KEY.checkpoints, now_text, id) end
    if first or apart(at, now_ms, HOUR_MS) then refresh(id) end
  end
  return have
end
